"""The k-NN score while training: `eval.knn` of a recipe."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import pictures
from PIL import Image
from tiny_runs import LABELS, RECIPE, digests, losses, metrics, run, write_recipe
from torch.nn import functional as F

import mpp
from mpp.data.subset import some_labelled
from mpp.execution import choose
from mpp.recipe import load_recipe
from mpp.run.evaluation import evaluation
from mpp.run.images import comparable, open_images
from mpp.run.neighbours import Neighbours
from mpp.run.start import build, with_index
from mpp.shards.index import ShardError, read_index
from mpp.shards.write import make_shards

BOTH = {"mpp": RECIPE.replace("PATH,", "PATH, val: test,") + "eval: {every: 2}\n", "labels": LABELS}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Two kinds of pictures, bright ones and dark ones, that neighbours can tell apart at times."""
    root = tmp_path_factory.mktemp("near")
    for split, count in {"train": 40, "test": 20}.items():
        for number, picture in enumerate(pictures(count, seed=len(split))):
            place = root / "source" / split / f"class{number % 2}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture // 2 + 40 * (number % 2)).save(place / f"{number:04d}.png")
    make_shards(root / "source", root / "shards", per_shard=25, report=lambda line: None, progress=False)
    return root / "shards"


def vote(encoder: torch.nn.Module, shards: Path, known: torch.Tensor | None = None) -> float:
    """The figure, the slow way round: each image by itself, the twenty nearest by sorting."""
    found = {}
    for split in ("train", "test"):
        [batch] = mpp.read_shards(shards, 100, split=split, image=(16, 16), train=False)
        with torch.no_grad():
            each = [F.normalize(encoder.eval()(image[None]).double())[0] for image in batch.images]
        found[split] = each, batch.labels.tolist()
    right = 0
    vectors, labels = found["train"]
    rows = range(len(labels)) if known is None else known
    for vector, label in zip(*found["test"], strict=True):
        near = sorted(((vector @ vectors[row]).item(), labels[row]) for row in rows)[-20:]
        votes = [sum(torch.tensor(s / 0.07).exp().item() for s, of in near if of == one) for one in (0, 1)]
        right += votes.index(max(votes)) == label
    return right / len(found["test"][1])


@pytest.mark.parametrize("name", BOTH)
def test_it_is_the_vote_of_neighbours_by_the_encoder_that_is_the_result(name, shards, tmp_path):
    recipe = write_recipe(tmp_path, shards, BOTH[name])
    command = "pretrain" if name == "mpp" else "finetune"
    assert run(command, recipe, f"out={tmp_path / 'run'}", "train.ema=0.5", "eval.knn=1000").code == 0
    found = {line["step"]: line["val/knn"] for line in metrics(tmp_path / "run") if "val/loss" in line}
    assert [*found] == [2, 4, 6]
    assert found[6] == pytest.approx(vote(mpp.load_encoder(tmp_path / "run"), shards))
    assert 0 < found[6] < 1


def test_training_is_the_same_with_it_and_without(shards, tmp_path):
    recipe = write_recipe(
        tmp_path,
        shards,
        BOTH["labels"].replace("cpu}", "cpu, ema: 0.5}").replace("depth: 2,", "depth: 2, dropout: 0.2,"),
    )
    for knn in (0, 30):
        assert run("finetune", recipe, f"out={tmp_path / str(knn)}", f"eval.knn={knn}").code == 0
    one, other = (tmp_path / knn for knn in ("0", "30"))
    assert losses(one) == losses(other)
    assert digests(one, 6) == digests(other, 6)
    for here, there in zip(metrics(one), metrics(other), strict=True):
        assert {name: there[name] for name in here if name.startswith("val/")} == {
            name: here[name] for name in here if name.startswith("val/")
        }
    assert not any("val/knn" in line for line in metrics(one))


def scorer(shards: Path, tmp_path: Path, *overrides: str):
    recipe = load_recipe(write_recipe(tmp_path, shards, BOTH["mpp"]), overrides)
    images = open_images(recipe, None, lambda what, choose: choose())
    settings = with_index(recipe, images.batches.index).in_steps(images.batches.epoch)
    objective = build(settings)
    execution = choose(objective, images.batches, settings.train)
    return objective, images, evaluation(settings, objective, images, execution)


def test_it_knows_as_many_as_were_asked_for_the_same_for_every_seed(shards, tmp_path):
    objective, images, evaluate = scorer(shards, tmp_path, "eval.knn=25")
    assert len(images.known) == 25
    again = scorer(shards, tmp_path, "eval.knn=25", "seed=8")[1].known
    assert again.key_bytes.tobytes() == images.known.key_bytes.tobytes()
    rows = some_labelled(read_index(shards, "train"), 25)
    assert evaluate([])["val/knn"] == pytest.approx(vote(objective.encoder, shards, rows))


def test_a_signal_while_it_looks_for_neighbours_leaves_the_scoring_to_the_next_start(shards, tmp_path, monkeypatch):
    stop, looked, vectors = [], [], Neighbours.vectors

    def signalled(self, batch, own, joined):
        looked.append(own)
        if len(looked) == 6:  # 20 images to score are 5 batches of 4, before the first of 10 to know
            stop.append(15)
        return vectors(self, batch, own, joined)

    monkeypatch.setattr(Neighbours, "vectors", signalled)
    objective, _, evaluate = scorer(shards, tmp_path, "eval.knn=40")
    assert evaluate(stop) == {}
    assert len(looked) == 6
    assert objective.training
    assert 0 <= evaluate([])["val/knn"] <= 1


def test_classes_meet_by_name_and_images_without_a_label_are_left_out(shards, tmp_path):
    train, test = read_index(shards, "train"), read_index(shards, "test")
    turned = replace(test, classes=("other", *test.classes[::-1]), label=(2 - test.label).astype("int32"))
    known, scored = comparable(train, turned, 10)
    assert scored.classes == known.classes == ("class0", "class1", "other")
    assert (scored.label == test.label).all()
    few = train.label.copy()
    few[5:] = -1
    assert some_labelled(replace(train, label=few), 10).tolist() == [0, 1, 2, 3, 4]


def test_some_labelled_are_few_shards_of_those_by_url(shards):
    index = read_index(shards, "train")
    remote = replace(index, shards=tuple(f"http://a/{name}" for name in index.shards))
    for count in (1, 10, 15):  # shards of 25 and 15 images
        chosen = some_labelled(remote, count)
        assert len(chosen) == count
        assert len({*remote.shard[chosen].tolist()}) == 1
    assert len(some_labelled(remote, 30)) == 30
    assert some_labelled(remote, 100).tolist() == list(range(40))
    assert len({*index.shard[some_labelled(index, 10)].tolist()}) == 2


def test_what_it_needs_is_one_line(shards, tmp_path, inside_tmp):
    recipe = write_recipe(tmp_path, shards)
    line = run("pretrain", recipe, "eval.knn=5").line
    assert line.endswith("eval.knn (5) scores images of another split, and data.val names none")
    assert "eval.knn must be at least 0, got -1" in run("pretrain", recipe, "eval.knn=-1").line
    train, test = read_index(shards, "train"), read_index(shards, "test")
    bare = {
        "train": replace(train, classes=(), label=0 * train.label - 1),
        "test": replace(test, label=0 * test.label - 1),
    }
    for split, index in bare.items():
        pair = {"train": train, "test": test} | {split: index}
        with pytest.raises(ShardError, match=f"split {split} has no labels, which eval.knn needs$"):
            comparable(pair["train"], pair["test"], 5)
