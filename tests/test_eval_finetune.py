import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import picture_folder
from PIL import Image
from tiny_runs import LABELS, RESNET, digests, metrics, run, small_splits, write_recipe

from mpp.data.config import SubsetConfig
from mpp.data.subset import drawn
from mpp.execution import at_once
from mpp.recipe import load_recipe
from mpp.run.images import open_images
from mpp.shards.index import read_index
from mpp.shards.write import make_shards
from mpp.weights import load_classifier, load_encoder

EVERYTHING = [
    "model.dropout=0.1",
    "model.drop_path=0.3",
    "objective.smoothing=0.1",
    "objective.mixup=0.8",
    "objective.cutmix=1.0",
    "objective.balance=true",
    "data.augment.randaugment=2",
    "data.augment.magnitude_std=0.5",
    "data.augment.erase=0.5",
    "train.optimizer=sgd",
    "train.layer_decay=0.8",
    "train.min_lr=1e-3",
    "train.ema=0.9",
    "train.weight_decay=0.1",
]
SHORT = ["train.steps=3", "train.warmup=0", "eval.every=3"]
OF_RESNETS = [setting for setting in EVERYTHING if not setting.startswith("model.")]
TIMES = ("images/s", "waiting", "memory")  # what no two runs share


def trained_on(out: Path):
    """The images that a run trained on."""
    return open_images(load_recipe(out / "recipe.yaml"), None, at_once).batches.index


@pytest.fixture(autouse=True, scope="module")
def exact() -> Iterator[None]:
    """Scores in float32 on any machine, so that they compare closely."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mpp.hardware.multiplies_bfloat16", lambda device: False)
        yield


@pytest.fixture(scope="module")
def splits(tmp_path_factory) -> Path:
    """40 images to train on and 20 to test on, of three classes."""
    return small_splits(tmp_path_factory.mktemp("splits"), classes=3)


@pytest.fixture(scope="module")
def pretrained(splits, tmp_path_factory) -> Path:
    """The run folder of an encoder, with a class token, that never saw a label."""
    folder = tmp_path_factory.mktemp("pretrained")
    recipe = write_recipe(folder, splits)
    settings = ["model.depth=2", "train.steps=2", "log.tensorboard=false"]
    assert run("pretrain", recipe, *settings, f"out={folder / 'run'}").code == 0
    return folder / "run"


@pytest.fixture(scope="module")
def tuned(splits, tmp_path_factory) -> Path:
    """The run folder of a short training with labels; tests may look, not touch."""
    folder = tmp_path_factory.mktemp("tuned")
    result = run("finetune", write_recipe(folder, splits, LABELS), f"out={folder / 'run'}")
    assert result.code == 0, result
    (folder / "run" / "said.txt").write_text(result.out)
    return folder / "run"


@pytest.fixture
def recipe(splits, tmp_path) -> Path:
    return write_recipe(tmp_path, splits, LABELS)


def finetune(recipe: Path, out: Path, *arguments: object) -> Path:
    result = run("finetune", recipe, *arguments, f"out={out}")
    assert result.code == 0, result
    return out


def refused(*arguments: object) -> str:
    """The one line of a command that must exit with status 2."""
    result = run(*arguments)
    assert result.code == 2, result
    return result.line


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@torch.no_grad()
def logits_of(out: Path, shards: Path, split: str, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a run's classifier says of images, each read by Pillow alone, and their labels."""
    classifier, index, logits = load_classifier(out), read_index(shards, split), []
    for number in numbers:
        tar = (shards / index.shards[index.shard[number]]).read_bytes()
        pixels = np.array(Image.open(io.BytesIO(tar[index.offset[number] :])).convert("RGB"))
        logits.append(classifier(torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0))[0].numpy())
    return np.stack(logits).astype(np.float64), index.label[numbers]


def loss_and_accuracy(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return -logs[np.arange(len(labels)), labels].mean(), (logits.argmax(1) == labels).mean()


def last_scores(out: Path) -> tuple[float, float]:
    line = [line for line in metrics(out) if "val/loss" in line][-1]
    return line["val/loss"], line["val/accuracy"]


# The whole path


def test_training_from_scratch_leaves_a_classifier_and_its_scores(tuned):
    names = {path.name for path in tuned.iterdir()} - {".lock", "said.txt"}
    left = {"recipe.yaml", "settled.json", "metrics.jsonl", "checkpoints"}
    assert names == left | {"classifier.safetensors", "encoder.safetensors", "scores.json"}
    said = (tuned / "said.txt").read_text()
    assert f"{tuned}/classifier.safetensors" in said
    assert f"{tuned}/metrics.jsonl" in said
    lines = metrics(tuned)
    assert [line["step"] for line in lines if "val/accuracy" in line] == [2, 4, 6]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    own, other = load_encoder(tuned).state_dict(), load_classifier(tuned).encoder.state_dict()
    assert all(torch.equal(own[name], other[name]) for name in own)


def test_the_scores_are_those_of_the_last_weights_on_all_test_images(tuned, splits):
    logits, labels = logits_of(tuned, splits, "test", np.arange(20))
    loss, accuracy = loss_and_accuracy(logits, labels)
    scores = json.loads((tuned / "scores.json").read_text())
    assert scores["n"] == 20
    assert scores["top1"] == pytest.approx(accuracy)
    assert scores["loss"] == pytest.approx(loss, rel=1e-4)
    guesses = np.zeros((3, 3), int)
    np.add.at(guesses, (labels, logits.argmax(1)), 1)
    places = np.nonzero(guesses)
    found = {"true": places[0].tolist(), "predicted": places[1].tolist(), "images": guesses[places].tolist()}
    assert scores["confusion"] == found
    assert scores["classes"] == ["class0", "class1", "class2"]
    assert last_scores(tuned) == (pytest.approx(loss, rel=1e-4), pytest.approx(accuracy))


def settled(out: Path) -> dict:
    return json.loads((out / "settled.json").read_text())


def test_classes_and_weights_are_settled_by_the_images_at_the_first_start(recipe, splits, tmp_path):
    out = finetune(recipe, tmp_path / "run", "objective.balance=true", "train.steps=2", "data.subset.per_class=13")
    objective = settled(out)["objective"]
    assert objective["classes"] == ["class0", "class1", "class2"]
    assert yaml.safe_load((out / "recipe.yaml").read_text())["objective"]["classes"] == [], "as it was asked"
    assert objective["weights"] == [pytest.approx(3, rel=1e-5)] * 3
    whole = finetune(recipe, tmp_path / "whole", "objective.balance=true", "train.steps=2")
    objective = settled(whole)["objective"]
    counts = np.bincount(read_index(splits, "train").label)
    assert sorted(counts) == [13, 13, 14]
    assert objective["weights"] == pytest.approx((40 / counts).tolist(), rel=1e-5)
    before = contents(whole)
    finetune(recipe, whole, "objective.balance=true", "train.steps=2")
    assert contents(whole) == before, "a finished run started again changes nothing"


def test_weights_to_start_from_are_those_of_a_run(recipe, pretrained, tmp_path):
    still = ["train.lr=1e-30", "train.steps=1", "train.warmup=0", "seed=99"]
    out = finetune(recipe, tmp_path / "run", "--from", pretrained, *still)
    found, given = load_encoder(out).state_dict(), load_encoder(pretrained).state_dict()
    positions = given.pop("positions.table")
    assert torch.equal(found.pop("positions.table"), positions[1:]), "that of the class token is left aside, as it is"
    assert found.keys() == given.keys() - {"class_token"}
    assert all(torch.equal(value, given[name]) for name, value in found.items())
    assert load_recipe(out / "recipe.yaml").weights == str(pretrained)


def test_a_finished_run_is_done_wherever_its_weights_and_images_lie_and_not_if_they_are_others(
    recipe, splits, pretrained, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pretrained, "pre")
    shutil.copytree(splits, "images")
    finetune(recipe, "out", "--from", "pre", "data.path=images")
    before = contents(Path("out"))
    finetune(recipe, "out", "--from", tmp_path / "pre", f"data.path={tmp_path / 'images'}")
    os.rename("pre", "archived")
    os.rename("images", "pictures")
    finetune(recipe, "out", "--from", "pre", "data.path=pictures")
    finetune(recipe, "out", "--from", "archived/encoder.safetensors", "data.path=pictures")
    assert contents(Path("out")) == before
    assert (
        run("pretrain", recipe, "seed=8", "objective.name=mpp", "train.steps=2", "data.val=null", "out=pre").code == 0
    )
    line = refused("finetune", recipe, "--from", "pre", "data.path=pictures", "out=out")
    assert "out: holds a run that began from other weights than pre now holds" in line
    assert contents(Path("out")) == before


def test_results_without_the_checkpoints_of_their_run_are_not_taken_for_those_of_another(tuned, recipe, tmp_path):
    out = shutil.copytree(tuned, tmp_path / "run")
    shutil.rmtree(out / "checkpoints")
    before = contents(out)
    line = refused("finetune", recipe, "seed=4", f"out={out}")
    assert line.startswith(f"mpp: {out / 'encoder.safetensors'}: of a run whose checkpoints are gone")
    assert contents(out) == before


@pytest.mark.parametrize("image", [8, 32])
def test_weights_may_come_from_images_of_another_size(image, recipe, pretrained, tmp_path):
    out = finetune(recipe, tmp_path / "run", "--from", pretrained, f"model.image={image}", "train.steps=2")
    encoder = load_classifier(out).encoder
    assert encoder.config.image == (image, image)
    assert len(encoder.positions.table) == (image // 4) ** 2


# Parts of the labels


def test_a_share_of_the_labels_is_what_is_trained_on(recipe, splits, tmp_path):
    settings = ["data.subset.share=0.5", "train.epochs=1", "train.warmup=0"]
    out = finetune(recipe, tmp_path / "run", *settings)
    index = read_index(splits, "train")
    numbers, _ = drawn(index, SubsetConfig(share=0.5), seed=3)
    counts = np.bincount(index.label[numbers])
    assert sorted(counts) == [6, 6, 7]
    assert settled(out)["steps"] == 3, "19 images in batches of 8"
    read = trained_on(out)
    assert [read.key(i) for i in range(len(read))] == [index.key(i) for i in numbers]


def test_held_out_images_are_scored_in_the_place_of_the_test_images(recipe, splits, tmp_path):
    out = finetune(recipe, tmp_path / "run", "data.subset.hold_out=0.3", "train.lr=0.1")
    numbers, held = drawn(read_index(splits, "train"), SubsetConfig(hold_out=0.3), seed=3)
    assert len(held) == 12
    assert len(trained_on(out)) == len(numbers) == 28
    loss, accuracy = loss_and_accuracy(*logits_of(out, splits, "train", held))
    assert last_scores(out) == (pytest.approx(loss, rel=1e-4), pytest.approx(accuracy))
    test, _ = loss_and_accuracy(*logits_of(out, splits, "test", np.arange(20)))
    assert test != pytest.approx(loss, rel=1e-3), "so the two can be told apart"
    assert json.loads((out / "scores.json").read_text())["loss"] == pytest.approx(test, rel=1e-4)


# Interrupted runs


@pytest.mark.parametrize(("text", "settings"), [(LABELS, EVERYTHING), (RESNET, OF_RESNETS)], ids=["vit", "resnet"])
def test_an_interrupted_run_ends_as_one_that_was_not(text, settings, splits, tmp_path):
    recipe = write_recipe(tmp_path, splits, text)
    settings = [*settings, "train.save_every=2", "train.keep=9"]
    whole = finetune(recipe, tmp_path / "whole", *settings)
    halves = shutil.copytree(whole, tmp_path / "halves")
    for step in (4, 6):  # as if it had been killed before it saved step 4
        shutil.rmtree(halves / f"checkpoints/step-{step:08d}")
    for name in ("classifier.safetensors", *(ends := ("encoder.safetensors", "scores.json"))):
        (halves / name).unlink()
    finetune(recipe, halves, *settings)
    for step in (4, 6):
        assert digests(halves, step) == digests(whole, step)
        assert "ema.safetensors" in digests(whole, step)
    assert [(halves / name).read_bytes() for name in ends] == [(whole / name).read_bytes() for name in ends]
    own, other = (load_classifier(folder).state_dict() for folder in (halves, whole))
    assert own.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in own.items())
    lines = [
        [{k: v for k, v in line.items() if k not in TIMES} for line in metrics(folder)] for folder in (whole, halves)
    ]
    assert lines[0] == lines[1]


@pytest.fixture(scope="module")
def plain(splits, tmp_path_factory) -> dict[str, torch.Tensor]:
    """What three steps without any of those settings leave."""
    folder = tmp_path_factory.mktemp("plain")
    return load_classifier(finetune(write_recipe(folder, splits, LABELS), folder / "run", *SHORT)).state_dict()


@pytest.mark.parametrize("setting", [setting for setting in EVERYTHING if "magnitude_std" not in setting])
def test_each_of_those_settings_changes_what_a_run_leaves(setting, recipe, plain, tmp_path):
    found = load_classifier(finetune(recipe, tmp_path / "run", *SHORT, setting)).state_dict()
    assert not all(torch.equal(value, plain[name]) for name, value in found.items())


# What is left to the machine


def test_a_resnet_with_batch_norm_sees_its_batches_whole(splits, tmp_path):
    recipe = write_recipe(tmp_path, splits, RESNET)
    out = finetune(recipe, tmp_path / "run", "train.micro_batch=auto", "train.steps=2")
    assert settled(out)["execution"]["micro_batch"] == 8
    assert load_classifier(out).encoder.config.name == "resnet"


def test_images_without_a_label_are_left_out(tmp_path):
    for split, count in {"train": 12, "test": 6}.items():
        folder = picture_folder(tmp_path / "source" / split, count)
        loose = np.random.default_rng(1).integers(0, 256, (3, 16, 16, 3), np.uint8)
        for number, pixels in enumerate(loose):
            Image.fromarray(pixels).save(folder / f"loose{number}.png")
    shards = tmp_path / "shards"
    make_shards(tmp_path / "source", shards, report=lambda line: None, progress=False)
    index = read_index(shards, "test")
    assert sorted(index.label) == [-1] * 3 + [0] * 3 + [1] * 3
    out = finetune(write_recipe(tmp_path, shards, LABELS), tmp_path / "run", "train.steps=2")
    loss, accuracy = loss_and_accuracy(*logits_of(out, shards, "test", np.flatnonzero(index.label >= 0)))
    scores = json.loads((out / "scores.json").read_text())
    assert (scores["n"], scores["top1"]) == (6, pytest.approx(accuracy))
    assert scores["loss"] == pytest.approx(loss, rel=1e-4)
    assert last_scores(out) == (pytest.approx(loss, rel=1e-4), pytest.approx(accuracy))
    assert len(trained_on(out)) == 12


# What is refused


def test_a_class_that_only_test_images_have_is_named(tmp_path):
    picture_folder(tmp_path / "source/train", 8, classes=2)
    picture_folder(tmp_path / "source/test", 9, classes=3)
    shards = tmp_path / "shards"
    make_shards(tmp_path / "source", shards, report=lambda line: None, progress=False)
    line = refused("finetune", write_recipe(tmp_path, shards, LABELS), f"out={tmp_path / 'run'}")
    assert "split test has images of class class2, of which split train has none to train on" in line
    assert str(shards) in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["train", "test"])
def test_shards_without_labels_are_named(split, splits, tmp_path):
    for name in ("train", "test"):
        picture_folder(tmp_path / "source" / name, 8)
    make_shards(tmp_path / "source", tmp_path / "plain", labels="none", report=lambda line: None, progress=False)
    shards = tmp_path / "plain"
    if split == "test":  # with labels to train on, but none to score by
        shards = shutil.copytree(splits, tmp_path / "mixed")
        for path in (tmp_path / "plain").glob("test*"):
            shutil.copy(path, shards)
    line = refused("finetune", write_recipe(tmp_path, shards, LABELS), f"out={tmp_path / 'run'}")
    assert f"{shards}: split {split} has no labels" in line


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("model.width=64", "width 32 there, 64 here"),
        ("model.gelu=tanh", "gelu erf there, tanh here"),
        ("model.depth=3", "depth 2 there, 3 here"),
    ],
)
def test_weights_of_another_shape_are_refused_with_what_differs(setting, expected, recipe, pretrained, tmp_path):
    line = refused("finetune", recipe, "--from", pretrained, setting, f"out={tmp_path / 'run'}")
    assert str(pretrained) in line
    assert expected in line
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_weights_of_a_vit_do_not_fit_a_resnet(splits, pretrained, tmp_path):
    recipe = write_recipe(tmp_path, splits, RESNET)
    line = refused("finetune", recipe, "--from", pretrained, f"out={tmp_path / 'run'}")
    assert "name vit there, resnet here" in line


def test_a_recipe_without_labels_is_not_for_finetune(splits, tmp_path):
    line = refused("finetune", write_recipe(tmp_path, splits), f"out={tmp_path / 'run'}")
    assert re.fullmatch("mpp: tiny: objective.name is mpp, expected labels, or another that .*mpp pretrain.*", line)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["pretrained", "tuned"])
def test_the_folder_of_another_run_is_refused_and_left_as_it_is(kind, recipe, request, tmp_path):
    out = shutil.copytree(request.getfixturevalue(kind), tmp_path / "run")
    before = contents(out)
    line = refused("finetune", recipe, "train.lr=2e-3", f"out={out}")
    assert f"{out}: holds a run of another recipe" in line
    assert "train.lr: " in line
    assert contents(out) == before


def test_classes_of_other_shards_are_refused(recipe, splits, tmp_path):
    line = refused("finetune", recipe, "objective.classes=[cat, dog]", f"out={tmp_path / 'run'}")
    assert f"{splits}: has 3 classes (class0, class1, class2), objective.classes are 2 (cat, dog)" in line


def test_weights_of_more_classes_than_there_are_are_refused(recipe, tmp_path):
    line = refused("finetune", recipe, "objective.weights=[1, 2, 3, 4]", f"out={tmp_path / 'run'}")
    assert line == "mpp: objective.weights needs 3 numbers, one a class, got 4"


def test_without_a_split_to_score_on_there_are_no_scores(recipe, tmp_path):
    out = finetune(recipe, tmp_path / "run", "data.val=null", "train.steps=2")
    assert not (out / "scores.json").exists()
    assert not [line for line in metrics(out) if "val/loss" in line]
    assert load_classifier(out).classes == ("class0", "class1", "class2")
