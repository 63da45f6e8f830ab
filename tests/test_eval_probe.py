import json
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import picture_folder, tiny_config
from sklearn.metrics import accuracy_score
from sklearn.neighbors import NearestCentroid
from tiny_runs import run, small_splits, write_recipe

from mpp.errors import UserError
from mpp.eval import Row
from mpp.eval.features.extract import ProbeError, extract
from mpp.eval.probes.knn import knn_accuracy
from mpp.eval.probes.linear import choices, linear_probe
from mpp.eval.probes.linear_sgd import SGDConfig
from mpp.eval.probes.probe import probe, probe_encoder
from mpp.eval.probes.protocols import PROTOCOLS, ProtocolError
from mpp.models.cnn import ResNet
from mpp.models.resnet_config import ResNetConfig
from mpp.models.vit import ViT
from mpp.shards.index import read_index
from mpp.shards.write import make_shards
from mpp.weights import save_encoder

BRIEF = {"linear-sgd": SGDConfig(epochs=2, warmup=1)}
EVERY = list(PROTOCOLS)

pytestmark = pytest.mark.usefixtures("own_parts")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MPP_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return small_splits(tmp_path_factory.mktemp("splits"))


@pytest.fixture
def encoder():
    return ViT(tiny_config(image=(16, 16), patch=4, pool="cls"))


def by_metric(rows):
    return {(row.protocol, row.metric): row for row in rows}


def test_rows_hold_what_the_protocols_find(splits, encoder):
    rows = probe_encoder(encoder, splits, EVERY, settings=BRIEF)
    found = by_metric(rows)
    assert len(found) == len(rows)
    train, test = extract(encoder, splits, "train"), extract(encoder, splits, "test")
    expected = linear_probe(choices(train.parts), train.labels, choices(test.parts), test.labels)
    row = found["linear", "top1"]
    assert (row.value, row.detail["features"], row.detail["l2"]) == (expected.accuracy, expected.choice, expected.l2)
    for metric, part, k in (("top1", "class 2", 20), ("k=10", "class 2", 10), ("k=10, average patch", "average 2", 10)):
        value = knn_accuracy(train.parts[part], train.labels, test.parts[part], test.labels, k=k)
        assert found["knn", metric].value == value
    shots = [metric for protocol, metric in found if protocol == "few-shot"]
    assert shots == [f"{shots}-shot{pooled}" for pooled in ("", ", average patch") for shots in (1, 5, 10)]
    assert found["few-shot", "5-shot"].value == np.mean(found["few-shot", "5-shot"].detail["accuracies"])
    assert found["linear-sgd", "top1"].detail["epochs"] == 2


def test_only_the_chosen_labels_are_used(splits, encoder):
    numbers = np.array([0, 1, 2, 3, 20, 21, 22, 23, 35])
    rows = probe_encoder(encoder, splits, ["linear", "knn"], "train", "test", numbers)
    train, test = extract(encoder, splits, "train").choose(numbers), extract(encoder, splits, "test")
    assert len(train) == 9
    expected = linear_probe(choices(train.parts), train.labels, choices(test.parts), test.labels)
    assert by_metric(rows)["linear", "top1"].value == expected.accuracy
    assert by_metric(rows)["knn", "top1"].detail["k"] == 9, "all there are"


def test_a_cnn_is_probed_too(splits):
    encoder = ResNet(ResNetConfig(image=(16, 16), depth=18, width=8, stem="small"))
    rows = probe_encoder(encoder, splits, EVERY, settings=BRIEF)
    assert {row.protocol for row in rows} == set(EVERY)
    assert by_metric(rows)["linear", "top1"].detail["features"] == "output"


def test_a_run_is_probed_before_and_after_training(splits, tmp_path):
    recipe = write_recipe(tmp_path, splits)
    assert run("pretrain", recipe, f"out={tmp_path / 'run'}").code == 0
    after, before = (probe(tmp_path / "run", splits, untrained=untrained) for untrained in (False, True))
    assert probe(tmp_path / "run" / "encoder.safetensors", splits).rows == after.rows
    assert before.rows != after.rows
    assert "before training" in str(before)
    assert "before training" not in str(after)
    with pytest.raises(ProbeError, match=r"no run folder \(it has no recipe.yaml\)"):
        probe(tmp_path / "run" / "encoder.safetensors", splits, untrained=True)


def test_the_table_and_the_json_hold_every_figure(splits, encoder, tmp_path):
    save_encoder(encoder, tmp_path / "encoder.safetensors")
    report = probe(tmp_path / "encoder.safetensors", splits, protocols=["knn", "linear"])
    report.save(tmp_path / "probe.json")
    read = json.loads((tmp_path / "probe.json").read_text())
    assert [(row["protocol"], row["metric"], row["value"]) for row in read["rows"]] == [
        (row.protocol, row.metric, row.value) for row in report.rows
    ]
    assert (read["train_images"], read["test_images"], read["untrained"]) == (40, 20, False)
    head, titles, *lines = str(report).splitlines()
    assert str(tmp_path / "encoder.safetensors") in head
    assert "40 images of train, 20 of test" in head
    assert titles.split() == ["protocol", "metric", "accuracy"]
    assert len(lines) == len(report.rows)
    for line, row in zip(lines, report.rows, strict=True):
        assert line.startswith(row.protocol)
        assert f" {100 * row.value:.2f} %" in line
    assert not any("[" in line or "{" in line for line in lines), "lists are for the JSON"


def labelled(root, **images):
    """Shards with so many images a class in each split."""
    for split, counts in images.items():
        for name, count in counts.items():
            (root / "source" / split).mkdir(parents=True, exist_ok=True)
            picture_folder(root / "made", count, classes=1)
            (root / "made" / "class0").rename(root / "source" / split / name)
    make_shards(root / "source", root / "shards", report=lambda line: None, progress=False)
    return root / "shards"


def test_a_class_that_training_lacks_is_named_before_anything_is_computed(encoder, tmp_path, monkeypatch):
    shards = labelled(tmp_path, train={"cat": 4, "dog": 4}, test={"cat": 2, "dog": 2, "emu": 1})
    monkeypatch.setattr("mpp.eval.features.extract._compute", None)
    with pytest.raises(ProbeError, match="split test has images of emu, of which there is no training image in train"):
        probe_encoder(encoder, shards)
    with pytest.raises(ProbeError, match="split test has images of dog, emu, of which"):
        probe_encoder(encoder, shards, numbers=np.flatnonzero(read_index(shards, "train").label == 0))


def test_one_image_a_class_works_but_for_linear_which_says_why(encoder, tmp_path, caplog):
    shards = labelled(tmp_path, train={"cat": 1, "dog": 1, "emu": 1}, test={"cat": 2, "dog": 2, "emu": 2})
    with caplog.at_level(logging.WARNING):
        found = by_metric(probe_encoder(encoder, shards))
    assert ("few-shot", "1-shot") in found
    assert ("few-shot", "5-shot") not in found
    assert ("knn", "top1") in found
    assert ("linear", "top1") not in found
    assert "linear: no class has two training images" in caplog.text
    assert "5, 10, 25 shots left out" in caplog.text
    with pytest.raises(ProbeError, match="no class has two training images"):
        probe_encoder(encoder, shards, ["linear"])


def test_splits_without_labels_or_not_there_are_named(encoder, splits, tmp_path, monkeypatch):
    make_shards(picture_folder(tmp_path / "a", 8), tmp_path / "b", labels="none", report=lambda _: None, progress=False)
    with pytest.raises(ProbeError, match="b: split train has no labels, and a probe needs them"):
        probe_encoder(encoder, tmp_path / "b", test="train")
    with pytest.raises(UserError, match="no split 'tset'; it holds test, train"):
        probe_encoder(encoder, splits, test="tset")
    monkeypatch.setattr("mpp.eval.probes.probe.extract", None)
    with pytest.raises(ProtocolError, match=r"no protocol 'lienar'; did you mean linear\?"):
        probe_encoder(encoder, splits, ["lienar"])
    with pytest.raises(ProtocolError, match="no protocol 'zzz'; there are linear, linear-sgd, few-shot, knn"):
        probe_encoder(encoder, splits, ["knn", "zzz"])


def add(name, rows, **more):
    PROTOCOLS.add(name, title="Nearest mean", text="The class whose mean is nearest.", rows=rows, **more)


def nearest_mean(task):
    means = [task.train.vectors[task.train.labels == label].mean(0) for label in range(len(task.train.classes))]
    guess = torch.cdist(task.test.vectors, torch.stack(means)).argmin(1)
    return [Row("nearest-mean", "top1", task.accuracy(guess))]


def test_a_protocol_of_ones_own_is_run_like_the_others(splits, encoder, own_parts):
    add("nearest-mean", nearest_mean)
    found = by_metric(probe_encoder(encoder, splits))
    assert {protocol for protocol, _ in found} == {"linear", "few-shot", "knn", "nearest-mean"}, "the cheap ones"
    train, test = extract(encoder, splits, "train"), extract(encoder, splits, "test")
    expected = NearestCentroid().fit(train.vectors.numpy(), train.labels).predict(test.vectors.numpy())
    assert found["nearest-mean", "top1"].value == accuracy_score(test.labels, expected)


def test_what_is_wrong_with_a_protocols_rows_is_said_at_once(splits, encoder, own_parts, caplog):
    add("borrowed", nearest_mean)
    with pytest.raises(ProtocolError, match="protocol borrowed: gave a row of 'nearest-mean', expected its own name"):
        probe_encoder(encoder, splits, ["knn", "borrowed"])
    add("odd", lambda task: [Row("odd", "top1", 0.5, {"features": task.train})])
    with pytest.raises(ProtocolError, match="protocol odd: gave a row that JSON can't hold"):
        probe_encoder(encoder, splits, ["odd"])
    add("forgetful", lambda task: [Row("forgetful", "top2", torch.tensor(0.5))])
    [row] = probe_encoder(encoder, splits, ["forgetful"])
    assert (row.metric, row.value) == ("top2", 0.5)
    assert "forgetful: no figure top1, by which it is compared; it gave top2" in caplog.text


def test_the_table_of_protocols_needs_no_torch():
    code = "import sys, mpp.eval; mpp.eval.PROTOCOLS['knn'], mpp.eval.Row; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_command_prints_a_table_and_writes_json(tmp_path):
    shards = small_splits(tmp_path)
    assert run("pretrain", write_recipe(tmp_path, shards), f"out={tmp_path / 'run'}").code == 0
    for extra in ([], ["--untrained"], ["--protocol", "knn"]):
        result = run("probe", tmp_path / "run", "--data", shards, "--json", tmp_path / "found.json", *extra)
        assert result.code == 0, result.err
        rows = json.loads((tmp_path / "found.json").read_text())["rows"]
        for row in rows:
            assert f"{100 * row['value']:.2f} %" in result.out
        protocols = {"knn"} if "knn" in extra else {"linear", "few-shot", "knn"}
        assert {row["protocol"] for row in rows} == protocols
    wrong = run("probe", tmp_path / "run", "--data", shards, "--test", "tset")
    assert wrong.code == 2
    assert "no split 'tset'; it holds test, train" in wrong.err
