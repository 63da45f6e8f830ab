"""docs/extending.md as printed: its files are written to a folder of their own and used from outside the package."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sklearn.neighbors import NearestCentroid
from tiny_runs import losses, metrics, run

from mpp import ENCODERS, OBJECTIVES, PROTOCOLS, load_encoder
from mpp.eval.features.extract import extract
from mpp.extend import ExtensionError, Kind, Table, import_parts
from mpp.recipe import load_recipe
from mpp.run.start import at_start
from mpp.shards.write import make_shards

DOC = Path(__file__).parents[1] / "docs/extending.md"
QUICK = ["train.device=cpu", "train.precision=float32", "train.threads=1", "log.every=1", "log.tensorboard=false"]


def printed() -> dict[str, str]:
    """The files that the page prints: each begins with its name in a comment."""
    blocks = re.findall(r"^```\w+\n(# (\w+\.(?:py|yaml))\n.*?)^```$", DOC.read_text(), re.MULTILINE | re.DOTALL)
    return {name: text for text, name in blocks}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The page's files, and the digits' shards, in a folder that is not on sys.path."""
    folder = tmp_path_factory.mktemp("outside")
    for name, text in printed().items():
        (folder / name).write_text(text)
    make_shards("digits", folder / "data/digits", report=lambda line: None, progress=False)
    return folder


@pytest.fixture(autouse=True)
def inside(files, monkeypatch):
    monkeypatch.chdir(files)


@pytest.fixture(scope="module", autouse=True)
def taken_out_again():
    """Files are run once in a process: their parts stay through this module, and leave the tables with it."""
    yield
    for table in (OBJECTIVES, PROTOCOLS, ENCODERS):
        table._added.clear()
    for name in [name for name in sys.modules if name.startswith("mpp_import_")]:
        del sys.modules[name]


def mpp(*arguments: object):
    result = run(*arguments)
    assert result.code == 0, result
    return result


def refused(*arguments: object) -> str:
    result = run(*arguments)
    assert result.code == 2, result
    return result.line


def short(name: str, out: str, *more: str) -> list[str]:
    """A few steps of a recipe of the page."""
    steps = ["train.epochs=null", "train.steps=6", "train.warmup=1", "train.batch=16", "train.save_every=3"]
    return ["pretrain", f"{name}.yaml", "--import", f"{name}.py", *steps, *QUICK, f"out={out}", *more]


def test_the_page_prints_the_files_that_are_tried_here():
    assert {
        "tiny_mae.py",
        "tiny_mae.yaml",
        "two_views.py",
        "two_views.yaml",
        "nearest_mean.py",
        "mean_colour.py",
    } <= printed().keys()
    assert len(printed()["tiny_mae.py"].splitlines()) <= 100


def test_the_commands_of_the_page_run_as_they_are_printed():
    commands = re.findall(r"^mpp (.*)$", DOC.read_text(), re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        result = mpp(*command.split())
    assert re.search(r"nearest-mean +top1 +\d\d\.\d\d %", result.out)


# An objective that drops patches and decodes with a trunk


def test_an_objective_from_outside_trains_logs_and_paints(tmp_path):
    result = mpp(*short("tiny_mae", str(tmp_path / "run"), "log.pictures=6"))
    assert all(name in result.out for name in ("encoder.safetensors", "pictures", "metrics.jsonl"))
    assert list((tmp_path / "run/pictures").iterdir())
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    # The decoder's head is drawn at random, so the first error is that of a guess near 0: mean of squares of pixels.
    assert all(line["psnr"] == pytest.approx(10 * math.log10(4 / line["loss"]), rel=1e-4) for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert load_encoder(tmp_path / "run").config.width == 32


def test_its_encoder_sees_a_quarter_of_the_patches_alone(tmp_path):
    import_parts("tiny_mae.py")
    objective = at_start(load_recipe("tiny_mae.yaml"))
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    dropped, kept = objective.draw(images)
    changed = images.clone()
    for image, patches in enumerate(dropped.tolist()):  # other pixels where the encoder must not look
        for patch in patches:
            row, column = divmod(patch, 4)
            changed[image, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] ^= 255
    assert dropped.shape[1] == 12
    torch.testing.assert_close(
        objective.predict(images, dropped, kept), objective.predict(changed, dropped, kept), rtol=0, atol=0
    )
    assert (changed != images).any()


def test_an_encoder_that_can_not_drop_patches_is_refused_before_anything_is_made(tmp_path):
    line = refused(*short("tiny_mae", str(tmp_path / "run"), "model.mixer=pool"))
    assert "objective.name tiny-mae drops patches" in line
    assert "model.mixer pool" in line
    assert not (tmp_path / "run").exists()


def test_a_misspelt_setting_of_it_is_named_with_the_nearest():
    assert "objective.shaer: unknown key. Did you mean: share?" in refused(*short("tiny_mae", "x", "objective.shaer=1"))


def test_another_objective_over_it_drops_its_keys(tmp_path):
    Path("over.yaml").write_text("base: tiny_mae.yaml\nobjective: {name: tiny-mae, width: 32}\n")
    import_parts("tiny_mae.py")
    assert load_recipe("over.yaml").objective.width == 32
    assert load_recipe("over.yaml", ["objective.name=mpp"]).objective.name == "mpp"
    assert "unknown key" in refused("plan", "over.yaml", "objective.name=mpp", "objective.width=32")


# Two views and a teacher


def test_a_teacher_starts_from_the_weights_that_are_given_and_is_what_is_saved(tmp_path):
    mpp(*short("tiny_mae", str(tmp_path / "first")))
    given = load_encoder(tmp_path / "first").state_dict()
    still = ["train.lr=1e-30", "--from", str(tmp_path / "first")]
    mpp(*short("two_views", str(tmp_path / "still"), *still))
    left = load_encoder(tmp_path / "still").state_dict()
    assert all(torch.equal(left[name], given[name]) for name in given), "the teacher equals them"
    mpp(*short("two_views", str(tmp_path / "run")))
    state = load_file(tmp_path / "run/checkpoints/step-00000006/model.safetensors")
    saved = load_encoder(tmp_path / "run").state_dict()
    assert all(torch.equal(state[f"teacher.{name}"], value) for name, value in saved.items())
    assert any(not torch.equal(state[f"encoder.{name}"], value) for name, value in saved.items())
    (tmp_path / "run/encoder.safetensors").unlink()
    half = load_encoder(tmp_path / "run").state_dict()
    assert all(torch.equal(half[name], value) for name, value in saved.items()), "also of a run that has not ended"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_it_goes_on_bit_for_bit_from_its_checkpoint(precision, tmp_path):
    mpp(*short("two_views", str(tmp_path / "whole"), f"train.precision={precision}"))
    mpp(*short("two_views", str(tmp_path / "halves"), f"train.precision={precision}"))
    halves = tmp_path / "halves"
    for path in (halves / "checkpoints/step-00000006").iterdir():
        path.unlink()
    (halves / "checkpoints/step-00000006").rmdir()
    (halves / "encoder.safetensors").unlink()
    mpp(*short("two_views", str(halves), f"train.precision={precision}"))
    assert losses(halves) == losses(tmp_path / "whole")
    assert (halves / "encoder.safetensors").read_bytes() == (tmp_path / "whole/encoder.safetensors").read_bytes()


def test_too_few_views_are_refused_in_one_line():
    line = refused(*short("two_views", "x", "data.views.second=null"))
    assert "objective.name two-views needs 2 views of each image, and data.views has 0 beside the first" in line


def test_its_predictor_has_a_learning_rate_of_its_own(tmp_path):
    import_parts("two_views.py")
    objective = at_start(load_recipe("two_views.yaml"))
    from mpp.loop import build_optimizer
    from mpp.train_config import TrainConfig

    optimizer = build_optimizer(objective, TrainConfig(steps=10, weight_decay=0.1))
    scales = {id(p): group["factors"].lr for group in optimizer.param_groups for p in group["params"]}
    named = {name: scales.get(id(parameter)) for name, parameter in objective.named_parameters()}
    assert {scale for name, scale in named.items() if name.startswith("predictor.")} == {10.0}
    assert {scale for name, scale in named.items() if name.startswith("encoder.")} == {1.0}
    assert {scale for name, scale in named.items() if name.startswith("teacher.")} == {None}, "it is not trained"


def test_a_plan_counts_the_teacher_apart():
    rows = mpp("plan", "two_views.yaml", "--import", "two_views.py").out.splitlines()
    found = {line.split()[0]: line.split()[1] for line in rows if len(line.split()) == 2}
    encoder = sum(p.numel() for p in at_start(load_recipe("two_views.yaml")).encoder.parameters())
    assert int(found["teacher"].replace(",", "")) == encoder


# A protocol


COMPARE = """
data: {path: data/digits, source: digits, train: train, val: test, augment: {crop: none, flip: false}}
model: {image: 8, patch: 2, width: 16, depth: 1, heads: 2, positions: sincos2d, pool: avg}
objective: {name: labels}
train: {steps: 4, warmup: 1, batch: 32, lr: 1e-3, device: cpu, threads: 1}
eval: {every: 1000, images: 64}
log: {pictures: 0, tensorboard: false}
compare:
  arms: {scratch: {finetune: tune.yaml}, pretrained: {pretrain: tiny_mae.yaml, finetune: tune.yaml}}
  seeds: [0]
  fractions: [0.2]
  protocols: [nearest-mean, knn]
"""


def test_a_protocol_from_outside_stands_in_help_and_rows():
    usage = mpp("probe", "--help", "--import", "nearest_mean.py").out
    assert "nearest-mean" in usage
    mpp(*short("tiny_mae", "runs/probed"))
    asked = ["--data", "data/digits", "--protocol", "nearest-mean", "--json", "probed.json"]
    shown = mpp("probe", "runs/probed", *asked, "--import", "nearest_mean.py").out
    [row] = json.loads(Path("probed.json").read_text())["rows"]
    found = [extract(load_encoder("runs/probed"), "data/digits", split) for split in ("train", "test")]
    train, test = (one.parts[one.output].double().numpy() for one in found)
    nearest = NearestCentroid().fit(train, found[0].labels.numpy())
    assert row["value"] == pytest.approx(nearest.score(test, found[1].labels.numpy()), abs=1e-6)
    assert f"{100 * row['value']:.2f} %" in shown


def test_it_appears_in_a_comparison_and_its_report(tmp_path):
    Path("tune.yaml").write_text(COMPARE.partition("compare:")[0])
    Path("compared.yaml").write_text(COMPARE)
    quick = ["train.epochs=null", "train.steps=4", "train.warmup=1", "train.batch=32"]
    imports = ["--import", "nearest_mean.py", "--import", "tiny_mae.py"]
    table = mpp("compare", "compared.yaml", *quick, f"out={tmp_path / 'out'}", *imports).out
    results = json.loads((tmp_path / "out/results.json").read_text())
    found = [row for row in results["rows"] if row["protocol"] == "nearest-mean"]
    assert {(row["arm"], row["fraction"], row["metric"]) for row in found} == {
        ("scratch", 0.2, "top1"),
        ("pretrained", 0.2, "top1"),
    }
    assert "nearest-mean, 20 % of the labels" in table
    page = (tmp_path / "out/report.html").read_text()
    assert "Nearest class mean" in page
    assert "encoder frozen" in page
    assert "what the decoder adds" in page, "the objective's own caption of a picture"


# A kind of encoder


def test_an_encoder_from_outside_is_trained_and_named_where_it_is_not_known(tmp_path):
    Path("coloured.yaml").write_text(
        "data: {path: data/digits, val: test}\nmodel: {name: mean-colour, image: 8}\nobjective: {name: labels}\n"
        "train: {steps: 3, batch: 16}\n"
    )
    out = tmp_path / "run"
    mpp("finetune", "coloured.yaml", "--import", "mean_colour.py", *QUICK, f"out={out}")
    assert load_encoder(out).width == 8
    for line in ("mpp.load_encoder(sys.argv[1])", "mpp.load_classifier(sys.argv[1])"):
        code = f"import sys, mpp\ntry: {line}\nexcept mpp.errors.UserError as error: print(error)"
        code = code.replace("import sys, mpp", "import sys, mpp, mpp.errors")
        found = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True, check=False)
        assert "its encoder mean-colour comes from --import" in found.stdout, found.stderr
        assert str(Path("mean_colour.py").resolve()) in found.stdout


# What a run without its import says


def test_a_run_started_again_without_its_import_names_it(tmp_path):
    out = tmp_path / "run"
    mpp(*short("tiny_mae", str(out)))
    code = "import sys\nfrom mpp.cli import main\nmain(sys.argv[1:])"
    again = [word for word in short("tiny_mae", str(out)) if word not in ("--import", "tiny_mae.py")]
    for command in (again, ["probe", str(out), "--data", "data/digits", "--untrained"]):
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        found = subprocess.run(
            [sys.executable, "-c", code, *command], capture_output=True, text=True, env=env, check=False
        )
        assert found.returncode == 2, found.stderr
        [line] = found.stderr.splitlines()
        assert f"--import {Path('tiny_mae.py').resolve()}" in line
    code = f"import mpp; print(mpp.load_encoder({str(out)!r}).config.width)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.stdout.strip() == "32", "its encoder is mpp's own"
    assert json.loads((out / "settled.json").read_text())["imports"] == {
        "objective.name": str(Path("tiny_mae.py").resolve())
    }


# Imports and packages


@pytest.fixture
def odd_taken_out():
    yield
    PROTOCOLS._added.pop("odd", None)


PROTOCOL = "import mpp\nmpp.PROTOCOLS.add({name!r}, title='t', text='s', rows=lambda task: {rows})\n"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("None", "TypeError"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("exit(0)", "SystemExit"),
        ("[3]", "expected mpp.Row"),
        ("[mpp.Row('odd', 5, 0.5)]", "expected mpp.Row"),
        ("[mpp.Row('odd', 'top1', 50.0)]", "gave top1 50; a row's value is a share in [0, 1]"),
        ("[mpp.Row('odd', 'top1', float('nan'))]", "a row's value is a share in [0, 1]"),
        ("[mpp.Row('odd', 'top1', 0.5), mpp.Row('odd', 'top1', 0.6)]", "two rows of one metric"),
        ("[mpp.Row('other', 'top1', 0.5)]", "gave a row of 'other'"),
        ("[mpp.Row('odd', 'top1', 0.5, dict(a=float('inf')))]", "JSON can't hold"),
    ],
)
def test_a_protocol_that_gives_nonsense_is_one_line(rows, said, tmp_path, odd_taken_out):
    Path(tmp_path / "odd.py").write_text(PROTOCOL.format(name="odd", rows=rows))
    if not Path("runs/odd").exists():
        mpp(*short("tiny_mae", "runs/odd"))
    line = refused("probe", "runs/odd", "--data", "data/digits", "--protocol", "odd", "--import", tmp_path / "odd.py")
    assert line.startswith("mpp: protocol odd: ")
    assert said in line


def test_a_protocol_may_give_its_rows_one_by_one(tmp_path, odd_taken_out):
    rows = "(mpp.Row('odd', name, 0.5) for name in ('top1', 'top2'))"
    Path(tmp_path / "odd.py").write_text(PROTOCOL.format(name="odd", rows=rows))
    mpp(*short("tiny_mae", "runs/odd"))
    asked = ["probe", "runs/odd", "--data", "data/digits", "--protocol", "odd", "--import", tmp_path / "odd.py"]
    assert "top2" in mpp(*asked).out


@pytest.mark.parametrize("name", ["finetune", "all"])
def test_words_that_mean_something_else_name_no_protocol(name, tmp_path):
    (tmp_path / f"{name}.py").write_text(PROTOCOL.format(name=name, rows="[]"))
    assert "this word means something else" in refused("recipes", "--import", tmp_path / f"{name}.py")


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("sizes: list = None", "is <class 'list'>"),
        ("path: object = None", "settings are int, float"),
        ("results: tuple = ()", "belongs to the class"),
    ],
)
def test_settings_that_no_recipe_can_hold_are_refused_when_they_are_added(field, said, tmp_path):
    text = "import dataclasses, mpp\n@dataclasses.dataclass(frozen=True)\nclass Odd(mpp.ObjectiveConfig):\n"
    text += f"    name: str = 'odd'\n    {field}\nmpp.OBJECTIVES.add('odd', Odd, None)\n"
    (tmp_path / f"{field[:4]}.py").write_text(text)
    assert said in refused("recipes", "--import", tmp_path / f"{field[:4]}.py")


def test_an_import_is_never_abbreviated_and_left_out():
    assert run("recipes", "--impo", "two_views.py").code == 2


def test_names_that_are_taken_or_cannot_stand_in_a_recipe_are_refused(tmp_path):
    for name, said in {"mpp": "mpp's own", "Ä b": "a name is made of"}.items():
        file = tmp_path / "clash.py"
        file.write_text(f"import mpp\nmpp.OBJECTIVES.add({name!r}, None, None)\n")
        line = refused("recipes", "--import", file)
        assert str(file) in line
        assert said in line
        file.unlink()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import no_such_module\n", "No module named"),
        ("x = 1\ny = 1 / 0\n", "line 2: division by zero"),
        ("x =\n", "invalid syntax"),
        ("raise SystemExit(0)\n", "line 1: 0"),
    ],
)
def test_a_file_that_fails_is_one_line_with_its_name(text, said, tmp_path):
    (tmp_path / f"bad{len(text)}.py").write_text(text)
    line = refused("recipes", "--import", tmp_path / f"bad{len(text)}.py")
    assert f"bad{len(text)}.py" in line
    assert said in line


def test_an_import_that_is_not_there_is_named():
    assert "nowhere.py: no such file" in refused("recipes", "--import", "nowhere.py")
    assert "expected a .py file" in refused("recipes", "--import", "./tiny_mae.yaml")
    assert "no_such_module_here" in refused("recipes", "--import", "no_such_module_here")
    assert "expected a .py file or an installed module" in refused("recipes", "--import")


def test_neither_the_current_folder_nor_the_files_is_where_modules_are_looked_for(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('a torch.py among the images was run')")
    (tmp_path / "mine.py").write_text("import torch, mpp\n")
    for command in (["-m", "mpp"], ["-c", "from mpp.cli import main; main()"]):
        if command[0] == "-c":
            command = ["-P", *command]
        found = subprocess.run(
            [sys.executable, *command, "recipes", "--import", "mine.py"],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert found.returncode == 0, found.stderr


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Installs a package with entry points: writes it and its metadata to a new folder of sys.path."""

    def install(name: str, points: str, code: str) -> None:
        (tmp_path / f"{name}.py").write_text(code)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(points)

    place = tmp_path / str(len(list(tmp_path.iterdir())))
    place.mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    yield install
    for module in [name for name in sys.modules if name.startswith("package_of_tests")]:
        del sys.modules[module]


def table() -> Table[Kind]:
    return Table("thing", "mpp.things_of_tests", Kind, {"own": Kind(Settings, int)})


@dataclass(frozen=True)
class Settings:
    size: int = 3


def test_a_package_is_listed_by_its_metadata_and_loaded_at_its_first_use(package, monkeypatch):
    things = table()
    monkeypatch.setitem(sys.modules, "things_of_tests", type(sys)("things_of_tests"))
    sys.modules["things_of_tests"].THINGS = things
    package(
        "package_of_tests_a",
        "[mpp.things_of_tests]\nother = package_of_tests_a\nforgotten = package_of_tests_a\n",
        "from things_of_tests import THINGS\nfrom test_extending import Settings\nTHINGS.add('other', Settings, str)\n",
    )
    assert list(things) == ["own", "other", "forgotten"]
    assert "other" in things
    assert "package_of_tests_a" not in sys.modules
    assert things["other"].maker is str
    assert "package_of_tests_a" in sys.modules
    with pytest.raises(ExtensionError, match="package package_of_tests_a: its module .* adds no thing forgotten"):
        things["forgotten"]


def test_what_is_first_imported_while_sizes_are_checked_keeps_its_constants(tmp_path, monkeypatch):
    (tmp_path / "constants_of_tests.py").write_text("import torch\nGREY = torch.tensor(128)\ndef make(): return GREY\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with torch.device("meta"):
        assert Kind(Settings, "constants_of_tests:make").make().item() == 128


def test_a_package_that_offers_a_name_of_mpps_is_refused(package):
    package("package_of_tests_b", "[mpp.things_of_tests]\nown = package_of_tests_b\n", "")
    with pytest.raises(ExtensionError, match="package package_of_tests_b offers the thing own, which mpp has itself"):
        table()["own"]


def test_two_packages_that_offer_one_name_are_refused(package):
    for letter in "cd":
        package(f"package_of_tests_{letter}", f"[mpp.things_of_tests]\nsame = package_of_tests_{letter}\n", "")
    with pytest.raises(ExtensionError, match=r"packages package_of_tests_\w and package_of_tests_\w both offer"):
        table()["same"]


def test_the_objectives_of_this_page_are_in_the_table_of_this_process():
    assert "tiny-mae" in OBJECTIVES
    assert Path(OBJECTIVES.origin("tiny-mae")).name == "tiny_mae.py"
