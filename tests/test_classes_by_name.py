"""Wherever labels of two indexes, or of an index and a classifier, meet, classes are the same by name."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from shard_files import quiet, write_tar
from tiny_runs import metrics, run

from mpp.data.read import read_shards
from mpp.eval import knn_accuracy
from mpp.eval.compare import gather
from mpp.eval.labelled.finetune import finetune
from mpp.eval.labelled.predict import score_split
from mpp.eval.probes.linear_sgd import SGDConfig
from mpp.eval.probes.probe import probe, probe_encoder
from mpp.loop import train
from mpp.models.vit import ViT
from mpp.models.vit_config import ViTConfig
from mpp.objectives.labels import Classification
from mpp.objectives.labels_config import LabelsConfig
from mpp.recipe import load_recipe
from mpp.shards.build import index_folder
from mpp.shards.index import read_index
from mpp.shards.tar import ShardError
from mpp.train_config import LogConfig, TrainConfig
from mpp.watch import TrainingError
from mpp.weights import load_classifier, load_encoder

COLOURS = {"cat": (255, 0, 0), "dog": (0, 255, 0), "emu": (0, 0, 255), "fox": (255, 255, 0)}
RECIPE = """\
data: {path: PATH, train: train, val: test, augment: {crop: none, flip: false}}
model: {image: 8, positions: sincos2d, patch: 4, width: 16, depth: 1, heads: 2, pool: avg}
objective: {name: labels}
train: {steps: 60, warmup: 2, batch: 32, lr: 1e-2, threads: 1, device: cpu, precision: float32, save_every: 30}
eval: {every: 30}
log: {every: 30, pictures: 0, tensorboard: false}
"""


def tar(path: Path, classes: list[str], count: int) -> None:
    """Images of one colour a class, with noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random, members = np.random.default_rng(len(path.name)), []
    for i in range(count):
        name = classes[i % len(classes)]
        pixels = np.clip(np.array(COLOURS.get(name, (128,) * 3)) * 0.8 + random.normal(0, 20, (8, 8, 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(png := io.BytesIO(), "PNG")
        members += [(f"{path.stem}{i:05d}.png", png.getvalue()), (f"{path.stem}{i:05d}.cls", name.encode())]
    write_tar(path, members)


def apart(folder: Path, **splits: list[str]) -> Path:
    """A folder of shards each of whose splits was indexed by itself, as by URL, and so numbers its own classes."""
    for split, classes in splits.items():
        tar(folder / split / f"{split}-0.tar", classes, 96 if split == "train" else 48)
        index_folder(folder / split, report=quiet)
        for path in sorted((folder / split).iterdir()):
            path.rename(folder / path.name)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = apart(tmp_path_factory.mktemp("apart"), train=["cat", "dog", "emu", "fox"], test=["dog", "emu", "fox"])
    assert read_index(folder, "train").classes[1] == read_index(folder, "test").classes[0] == "dog"
    return folder


def recipe_of(folder: Path, shards: Path, *overrides: str):
    (folder / "r.yaml").write_text(RECIPE.replace("PATH", str(shards)))
    return load_recipe(folder / "r.yaml", [f"out={folder / 'run'}", *overrides])


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, shards) -> Path:
    return finetune(recipe_of(tmp_path_factory.mktemp("tuned"), shards))[0]


def test_scores_while_training_are_those_at_the_end(tuned):
    scores = json.loads((tuned / "scores.json").read_text())
    last = [line for line in metrics(tuned) if "val/accuracy" in line][-1]
    assert scores["top1"] > 0.9, "colours are easy to tell apart"
    assert last["val/accuracy"] == pytest.approx(scores["top1"])
    assert last["val/loss"] == pytest.approx(scores["loss"], rel=0.02)  # bfloat16 in one of them
    assert scores["per_class"][0] is None, "no cat is tested on"


@pytest.mark.parametrize("protocol", ["knn", "few-shot", "linear"])
def test_probes_match_test_images_by_name(tuned, shards, protocol, tmp_path):
    rows = probe(tuned, shards, protocols=[protocol], cache=tmp_path).rows
    assert min(row.value for row in rows) > 0.9


def test_a_head_trained_on_a_frozen_encoder_matches_by_name(tuned, shards):
    settings = {"linear-sgd": SGDConfig(epochs=60, warmup=5, batch=32, blr=10)}
    [row] = probe_encoder(load_encoder(tuned), shards, ["linear-sgd"], settings=settings)
    assert row.value > 0.9


def test_a_classifier_is_scored_by_name_whatever_an_index_numbers(tuned, tmp_path):
    classifier = load_classifier(tuned)
    folder = apart(tmp_path, train=["fox", "emu"], test=["emu"], more=["cat"])
    for split in ("train", "test", "more"):
        assert score_split(classifier, folder, split).top1 > 0.9
        assert run("predict", tuned, folder, "--split", split).code == 0


def test_a_class_that_nobody_trained_on_is_named_everywhere(tuned, tmp_path):
    folder = apart(tmp_path, train=["cat", "dog"], test=["dog", "yak"])
    for words in (
        ["finetune", recipe_of_file(tmp_path, folder), f"out={tmp_path / 'run'}"],
        ["probe", tuned, "--data", folder],
        ["predict", tuned, folder, "--split", "test"],
    ):
        found = run(*words)
        assert found.code == 2
        assert "yak" in found.line
        assert "dog" not in found.line.partition("expected")[0].partition("of which")[0].partition(";")[0]


def recipe_of_file(folder: Path, shards: Path) -> Path:
    recipe_of(folder, shards)
    return folder / "r.yaml"


def test_mixed_sets_and_named_classes_may_be_in_any_order(tmp_path):
    one = apart(tmp_path / "one", train=["emu", "dog"], test=["dog"])
    other = apart(tmp_path / "other", train=["fox", "cat", "dog"])
    mixed = f"data.mix={{other: {{path: {other}}}}}"
    with pytest.raises(ShardError, match=r"data\.mix\.other: .* \(dog, emu\); it has images of class cat, fox$"):
        finetune(recipe_of(tmp_path, one, mixed))
    out, scores = finetune(recipe_of(tmp_path, one, mixed, "objective.classes=[fox, emu, cat, dog]"))
    assert scores.top1 > 0.9
    classifier = load_classifier(out)
    assert classifier.classes == ("fox", "emu", "cat", "dog")
    assert score_split(classifier, other, "train").top1 > 0.9


def test_a_run_goes_on_where_an_index_was_rebuilt_and_numbers_anew(tmp_path):
    shards = apart(tmp_path / "shards", train=["emu", "dog"], test=["dog", "emu"])
    whole, _ = finetune(recipe_of(tmp_path, shards, f"out={tmp_path / 'whole'}"))
    run("finetune", recipe_of_file(tmp_path, shards), f"out={tmp_path / 'run'}", "train.steps=60")
    for path in (tmp_path / "run").glob("*.safetensors"):
        path.unlink()
    for path in (tmp_path / "run/checkpoints/step-00000060").iterdir():
        path.unlink()
    (tmp_path / "run/checkpoints/step-00000060").rmdir()
    tar(shards / "aaa-0.tar", ["ant", "dog"], 4)  # classes are collected over all splits
    index_folder(shards, report=quiet)
    assert read_index(shards, "train").classes == ("ant", "dog", "emu")
    again, scores = finetune(recipe_of(tmp_path, shards))
    assert scores.top1 > 0.9
    assert load_classifier(again).classes == ("dog", "emu")
    ours, theirs = (load_classifier(out).state_dict() for out in (again, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_fine_tuning_starts_from_a_classifier_of_other_classes(tuned, tmp_path):
    shards = apart(tmp_path / "shards", train=["fox", "yak", "cat"], test=["yak", "fox"])
    out, scores = finetune(recipe_of(tmp_path, shards, f"weights={tuned}"))
    assert load_classifier(out).classes == ("cat", "fox", "yak")
    assert scores.top1 > 0.9


def test_vectors_of_two_splits_are_numbered_alike(tuned, shards, tmp_path):
    found = {}
    for split in ("train", "test"):
        assert run("embed", tuned, shards, tmp_path / f"{split}.npz", "--split", split).code == 0
        found[split] = np.load(tmp_path / f"{split}.npz")
    assert found["train"]["classes"].tolist() == found["test"]["classes"].tolist() == ["cat", "dog", "emu", "fox"]
    pairs = [torch.from_numpy(found[split][name]) for split in found for name in ("features", "labels")]
    assert knn_accuracy(*pairs, k=5) > 0.9
    names = dict(zip(found["test"]["keys"], found["test"]["labels"], strict=True))
    assert [found["test"]["classes"][names[f"test-0{i:05d}"]] for i in range(3)] == ["dog", "emu", "fox"]


def test_training_refuses_shards_that_number_its_classes_otherwise(shards, tmp_path):
    vit = ViT(ViTConfig(image=(8, 8), patch=4, width=16, depth=1, heads=2))
    objective = Classification(vit, LabelsConfig(classes=("cat", "dog", "emu", "fox")))
    config = TrainConfig(steps=1, batch=8, lr=1e-3, device="cpu", precision="float32")
    words = "labels: class dog is 1 of its classes and 0 of those of .*; give its classes to mpp.read_shards"
    with pytest.raises(TrainingError, match=words):
        train(objective, read_shards(shards, 8, split="test"), config, out=tmp_path)
    named = read_shards(shards, 8, split="test", classes=objective.config.classes)
    train(objective, named, config, out=tmp_path, log=LogConfig(tensorboard=False))
    other = Classification(vit, LabelsConfig(classes=("Hund", "Emu", "Fuchs")))
    train(other, read_shards(shards, 8, split="test"), config, out=tmp_path / "b", log=LogConfig(tensorboard=False))


def test_batches_are_numbered_by_given_names(shards):
    train = read_shards(shards, 48, train=False)
    assert train.index.classes == ("cat", "dog", "emu", "fox")
    test = read_shards(shards, 48, split="test", train=False, classes=train.index.classes)
    assert [train.index.classes[label] for label in test.at(0).labels.tolist()] == ["dog", "emu", "fox"] * 16
    with pytest.raises(ShardError, match=r"images of class emu, fox, expected 1 class \(dog\)$"):
        read_shards(shards, 8, split="test", classes=["dog"])


def test_accuracies_of_runs_that_order_their_classes_otherwise_stand_under_their_names():
    job = SimpleNamespace(arm="a", seed=0, fraction=1.0)
    scores = {"classes": ["c", "a", "b"], "per_class": [0.3, 0.1, None]}
    assert gather._per_class(job, scores, ["a", "b", "c", "d"])["accuracy"] == [0.1, None, 0.3, None]
    earlier = {"per_class": [0.1, 0.2, 0.3]}  # written before scores named their classes
    assert gather._per_class(job, earlier, ["a", "b", "c"])["accuracy"] == [0.1, 0.2, 0.3]
