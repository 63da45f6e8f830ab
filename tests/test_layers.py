"""Holds the order of docs/design.md: a module imports only from rows below its own, or from its own folder."""

import ast
from pathlib import Path

import mpp

ROOT = Path(mpp.__file__).parent
LAYERS = [
    {"__main__"},
    {"cli"},
    {"eval"},
    {"plan", "export"},
    {"run"},
    {"recipe"},
    {"weights"},
    {"loop"},
    {"objectives"},
    {"optim", "checkpoint", "log", "watch", "models", "masks", "mixing", "targets", "data"},
    {"shards", "augment"},
    {"remote", "decode_cuda"},
    {"decode"},
    {"files", "hardware"},
    {"batch", "seeds", "errors", "hints"},
]
LEVEL = {name: level for level, names in enumerate(reversed(LAYERS)) for name in names}


def part(module: str) -> str:
    """The part of the package a module belongs to: `data` for mpp.data.read."""
    return module.split(".")[1]


def imports() -> list[tuple[str, str, str]]:
    """(file, importing part, imported part) for every import of the package within itself, at any depth of the code."""
    found = []
    for file in sorted([*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("*/*/*.py")]):
        place = file.relative_to(ROOT).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mpp":
                modules = [f"mpp.{alias.name}" for alias in node.names] if node.module == "mpp" else [node.module]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names if alias.name.startswith("mpp.")]
            else:
                continue
            found += [(str(file.relative_to(ROOT)), place, part(module)) for module in modules]
    return found


def test_every_part_has_a_layer():
    parts = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/*.py")}
    assert parts - {"__init__", "recipes"} == LEVEL.keys()


def test_imports_go_down_the_layers():
    same_row = {("checkpoint", "log"), ("log", "checkpoint")}
    wrong = [
        f"{file} imports mpp.{imported}"
        for file, importing, imported in imports()
        if importing not in ("__init__", "recipes")
        and importing != imported
        and LEVEL[imported] >= LEVEL[importing]
        and (importing, imported) not in same_row
    ]
    assert not wrong


def test_help_imports_no_torch():
    import subprocess
    import sys

    code = (
        "import sys, mpp.cli\ntry: mpp.cli.main(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_evaluation_is_not_importable_under_a_second_name():
    import subprocess
    import sys

    found = subprocess.run(
        [sys.executable, "-c", "import eval"], cwd=ROOT.parent, capture_output=True, text=True, check=False
    )
    assert "import mpp.eval, not eval" in found.stderr
