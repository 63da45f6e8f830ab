"""Names of classes of any characters come back as they were, from a tar or a folder to every file that names them."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from odd_names import LOOK_ALIKE, ODD, PLAIN
from PIL import Image
from shard_files import quiet, write_tar
from tiny_runs import run

from mpp.export.convert import convert
from mpp.recipe import load_recipe, save_recipe
from mpp.recipe.settled import load_settled
from mpp.shards.build import index_folder
from mpp.shards.index import read_index
from mpp.shards.write import make_shards
from mpp.weights import load_classifier

LABELS = [name.strip() for name in ODD if name.strip()]  # `cls` is a line of text, whose ends do not count
RECIPE = """\
data: {path: PATH, val: test, augment: {crop: none, flip: false}}
model: {image: 8, patch: 4, width: 16, depth: 1, heads: 2}
objective: {name: labels, balance: true}
train: {steps: 4, batch: 16, lr: 1e-2, threads: 1, device: cpu, precision: float32, save_every: 2}
eval: {every: 2}
log: {every: 2, pictures: 0, tensorboard: false}
"""


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(data := io.BytesIO(), "PNG")
    return data.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    for split in ("train", "test"):
        members = []
        for i, name in enumerate(LABELS):
            members += [(f"{split}{i:04d}.png", png(i)), (f"{split}{i:04d}.cls", name.encode())]
        write_tar(folder / f"{split}-0.tar", members)
    index_folder(folder, report=quiet)
    return folder


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, shards) -> Path:
    """A run that was started twice."""
    folder = tmp_path_factory.mktemp("tuned")
    (folder / "r.yaml").write_text(RECIPE.replace("PATH", str(shards)))
    for _ in range(2):
        found = run("finetune", folder / "r.yaml", f"out={folder / 'run'}")
        assert found.code == 0, found.err
    (folder / "run/classifier.safetensors").rename(folder / "first")
    for path in sorted((folder / "run/checkpoints/step-00000004").iterdir()):
        path.unlink()
    (folder / "run/checkpoints/step-00000004").rmdir()
    found = run("finetune", folder / "r.yaml", f"out={folder / 'run'}")  # goes on from step 2
    assert found.code == 0, found.err
    assert (folder / "run/classifier.safetensors").read_bytes() == (folder / "first").read_bytes()
    return folder / "run"


def test_an_index_keeps_them(shards):
    for split in ("train", "test"):
        index = read_index(shards, split)
        assert sorted(index.classes) == sorted(LABELS)
        assert [index.classes[label] for label in index.label.tolist()] == LABELS


def test_a_run_keeps_them_in_every_file(tuned, shards):
    classes = read_index(shards, "train").classes
    assert load_classifier(tuned).classes == load_settled(tuned).classes == classes
    assert tuple(json.loads((tuned / "scores.json").read_text())["classes"]) == classes
    recipe = load_settled(tuned).fill(load_recipe(tuned / "recipe.yaml"))
    save_recipe(recipe, tuned / "all.yaml")
    assert load_recipe(tuned / "all.yaml").objective.classes == classes
    assert load_recipe(tuned / "all.yaml") == recipe


def test_predictions_name_them(tuned, shards, tmp_path):
    files = ["--out", tmp_path / "p.csv", "--json", tmp_path / "s.json"]
    found = run("predict", tuned, shards, "--split", "test", *files)
    assert found.code == 0, found.err
    with open(tmp_path / "p.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    texts = [{key: cell.removeprefix("'") for key, cell in row.items()} for row in rows]  # as docs/evaluation.md says
    assert [row["label"] for row in texts] == LABELS
    assert {row["class"] for row in texts} <= set(LABELS)
    assert not any(cell.startswith(("=", "+", "-", "@")) for row in rows for cell in row.values())
    assert json.loads((tmp_path / "s.json").read_text())["classes"] == list(load_classifier(tuned).classes)
    found = run("predict", tuned, shards, "--split", "test", "--out", tmp_path / "p.jsonl", "--top", "3")
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == LABELS
    found = run("predict", tuned, shards, "--split", "test")
    assert found.code == 0
    assert all(char.isprintable() or char == "\n" for char in found.out)
    lines = [line for line in found.out.splitlines() if line.startswith("test")]
    for name in LOOK_ALIKE:
        assert sum(line.endswith(f"; it is {name!a}") or f": {name!a} " in line for line in lines) >= 1


@pytest.mark.parametrize("to", ["huggingface", "timm", "safetensors"])
def test_converted_weights_name_them(tuned, to, tmp_path):
    made = convert(tuned, tmp_path / "out", to)
    card = (made.folder / "README.md").read_text(encoding="utf-8")
    assert all(char.isprintable() or char == "\n" for char in card)
    if to == "huggingface":
        config = json.loads((made.folder / "config.json").read_text())
        assert [config["id2label"][str(i)] for i in range(len(LABELS))] == list(load_classifier(tuned).classes)
    again = made.folder / "classifier.safetensors" if to == "safetensors" else made.folder
    assert load_classifier(again).classes == load_classifier(tuned).classes


def test_folders_name_them(tmp_path):
    names = [*PLAIN, " a", "a ", "   "]
    names = [name for name in names if "/" not in name]
    for i, name in enumerate(names):
        (tmp_path / "source/train" / name).mkdir(parents=True)
        (tmp_path / "source/train" / name / f"{i}.png").write_bytes(png(i))
    lines: list[str] = []
    make_shards(tmp_path / "source", tmp_path / "shards", report=lines.append, progress=False)
    assert any("look alike" in line and ascii(LOOK_ALIKE[1]) in line for line in lines)
    made = read_index(tmp_path / "shards", "train")
    assert sorted(made.classes) == sorted(names)
    index_folder(tmp_path / "shards", report=quiet)  # from the tars alone
    again = read_index(tmp_path / "shards", "train")
    assert again.classes == made.classes
    assert again.label.tolist() == made.label.tolist()


def test_a_recipe_may_name_them(shards, tmp_path):
    written = json.dumps(LABELS).replace("\\ud83d\\udc08", "\U0001f408")  # YAML has no halves of characters
    text = RECIPE.replace("PATH", str(shards)).replace("balance: true", f"classes: {written}")
    (tmp_path / "r.yaml").write_text(text)
    assert load_recipe(tmp_path / "r.yaml").objective.classes == tuple(LABELS)
    found = run("finetune", tmp_path / "r.yaml", f"out={tmp_path / 'run'}")
    assert found.code == 0, found.err
    assert load_classifier(tmp_path / "run").classes == tuple(LABELS)
    line = run("finetune", tmp_path / "r.yaml", f"out={tmp_path / 'other'}", "objective.classes=['${x}', '???']").line
    assert "has images of class" in line
    assert "objective.classes are 2 (${x}, ???)" in line
