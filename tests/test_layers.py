"""Holds the order of docs/design.md: a module imports only from rows below its own, or from its own folder, and no
imports go round in a circle, wherever in the code they stand."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import mpp

ROOT = Path(mpp.__file__).parent
LAYERS = [
    {"__main__"},
    {"cli"},
    {"eval"},
    {"plan", "export"},
    {"run", "fleet"},
    {"counts"},
    {"loop", "recipe", "weights"},
    {"checks"},
    {"execution", "begun", "saving", "average"},
    {"sharding"},
    {"objectives"},
    {"optim", "checkpoint", "log", "watch", "models", "masks", "mixing", "targets", "data"},
    {"shards", "augment"},
    {"remote", "decode_cuda"},
    {"decode", "ranks"},
    {"files", "differing", "hardware", "extend", "finite", "heartbeat", "meeting", "estimate"},
    {"jsons", "draws", "launch"},
    {"batch", "seeds", "errors", "hints", "budget", "train_config", "devices", "workers", "split", "knn"},
]
LEVEL = {name: level for level, names in enumerate(reversed(LAYERS)) for name in names}
CONFIGS = (
    "mpp.train_config", "mpp.extend", "mpp.recipe", "mpp.data.config", "mpp.augment.config", "mpp.objectives",
    "mpp.models.vit_config", "mpp.models.trunk_config", "mpp.models.resnet_config", "mpp.models.encoders",
    "mpp.eval.probes.protocols", "mpp.eval.compare.arms", "mpp.estimate",
)  # fmt: skip


def modules(root: Path) -> dict[str, Path]:
    """All modules below a package's folder, by name."""
    files = sorted([*root.glob("*.py"), *root.glob("*/*.py"), *root.glob("*/*/*.py")])
    names = {file: ".".join([root.name, *file.relative_to(root).with_suffix("").parts]) for file in files}
    return {name.removesuffix(".__init__"): file for file, name in names.items()}


def imported(name: str, file: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that one imports, at any depth of its code."""
    found = set()
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            above = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, [above, node.module or ""]))
            members = {f"{base}.{alias.name}" for alias in node.names}
            found |= {member if member in known else base for member in members}
    return {module for module in found if module in known and module != known and module != name.partition(".")[0]}


def circle(root: Path) -> list[str]:
    """A circle of imports below a folder, if there is one."""
    known = modules(root)
    graph = {name: imported(name, file, known) for name, file in known.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_every_part_has_a_layer():
    parts = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/*.py")}
    assert parts - {"__init__", "recipes"} == LEVEL.keys()


def test_imports_go_down_the_layers():
    known = modules(ROOT)
    pairs = [(name, other) for name, file in known.items() for other in imported(name, file, known)]
    part = {name: name.split(".")[1] for name in known if "." in name}
    wrong = [
        f"{name} imports {other}"
        for name, other in pairs
        if name in part
        and part[name] not in ("__init__", "recipes", part[other])
        and LEVEL[part[other]] >= LEVEL[part[name]]
    ]
    assert len(pairs) > 300
    assert not wrong


def test_no_imports_go_round_in_a_circle():
    assert circle(ROOT) == []


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("from p.b import x", "from p.a import y"),
        ("from .b import x", "def f():\n    from . import a"),
        ("import p.b", "from p import a"),
    ],
)
def test_a_circle_inside_a_folder_is_seen(first, second, tmp_path):
    (tmp_path / "p").mkdir()
    for name, text in {"__init__": "", "a": first, "b": second, "c": "from p import a, b"}.items():
        (tmp_path / f"p/{name}.py").write_text(text)
    assert set(circle(tmp_path / "p")) == {"p.a", "p.b"}
    (tmp_path / "p/b.py").write_text("")
    assert circle(tmp_path / "p") == []


# What answers without torch


def without_torch(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs code that must not have imported torch at its end."""
    code = f"import sys\ntry:\n    {code}\nexcept SystemExit: pass\nassert 'torch' not in sys.modules, 'torch is there'"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("module", CONFIGS)
def test_modules_of_configs_import_no_torch(module):
    without_torch(f"import {module}")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("probe", "--help"),
        ("recipes",),
        ("pretrain", "cifar10/mpp", "model.widht=64"),
        ("pretrain", "cifar10/mpp", "train.lr=fast"),
        ("finetune", "cifar10/finetune", "objective.smoothign=0.1"),
        ("plan", "cifar10/mpp", "data.augment.flp=true"),
        ("compare", "cifar10/compare", "compare.seads=[1]"),
        ("pretrain", "cifar10/mmp"),
    ],
)
def test_what_needs_no_tensor_answers_without_torch(arguments):
    done = without_torch("from mpp.cli import main; main(sys.argv[1:])", *arguments)
    wrong = arguments[-1] not in ("--help", "recipes")
    assert bool(done.stderr) == wrong, done
    assert len(done.stderr.splitlines()) == wrong


def test_the_evaluation_is_not_importable_under_a_second_name():
    found = subprocess.run(
        [sys.executable, "-c", "import eval"], cwd=ROOT.parent, capture_output=True, text=True, check=False
    )
    assert "import mpp.eval, not eval" in found.stderr
