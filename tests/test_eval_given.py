import re

import numpy as np
import pytest
import torch
from feature_clouds import clouds

from mpp.eval import few_shot_accuracy, knn_accuracy, linear_probe
from mpp.eval.probes.given import by_label

PROBES = {
    "few-shot": lambda *given: few_shot_accuracy(*given, l2=1.0),
    "knn": lambda *given: knn_accuracy(*given, k=5),
    "linear": lambda *given: linear_probe(*given, l2s=(1e-2,)).accuracy,
}


def changed(tensor, value, at=3):
    tensor = tensor.clone()
    tensor[at] = value
    return tensor


CHANGES = {
    "train labels must be at least 0, got -1 (no label: leave such images out)": (1, lambda y: changed(y, -1)),
    "test labels must be at least 0, got -7": (3, lambda y: changed(y, -7)),
    "train labels must be below 1000000, got 1000000000000": (1, lambda y: changed(y, 10**12)),
    "train labels must be whole numbers (int64) of shape (n,), at least one, got float32": (1, lambda y: y.float()),
    "test labels must be whole numbers (int64) of shape (n,), at least one, got bool": (3, lambda y: y > 1),
    "train labels must be whole numbers (int64) of shape (n,), at least one, got int64 of shape (40, 1)": (
        1, lambda y: y[:, None],
    ),
    "test labels must be whole numbers (int64) of shape (n,), at least one, got int64 of shape (0,)": (
        3, lambda y: y[:0],
    ),
    "train labels must be a torch tensor of whole numbers (n,), got list": (1, lambda y: y.tolist()),
    "train features must be of shape (39, d), one row a label, got (40, 8)": (1, lambda y: y[1:]),
    "test features must be of shape (20, d), one row a label, got (160,)": (2, lambda x: x.flatten()),
    "test features have 7 numbers an image, expected 8 as train has": (2, lambda x: x[:, 1:]),
    "train features must be finite, got nan in row 3": (0, lambda x: changed(x, float("nan"))),
    "test features must be finite, got inf in row 0": (2, lambda x: changed(x, float("inf"), 0)),
    "test features must be finite, got -inf in row 19": (2, lambda x: changed(x.half(), -float("inf"), 19)),
    "train features must be a torch tensor (n, d), got ndarray": (0, lambda x: x.numpy()),
    "train features must be real numbers, got complex64": (0, lambda x: x + 0j),
}  # fmt: skip


def given() -> list:
    (x, y), (test, truth) = clouds(40, 4), clouds(20, 4, seed=1)
    return [x[:, :8] - 5, y, test[:, :8] - 5, truth]


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("message", CHANGES)
def test_what_can_not_be_meant_is_refused_in_one_line(probe, message):
    place, change = CHANGES[message]
    tensors = given()
    tensors[place] = change(tensors[place])
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        PROBES[probe](*tensors)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("probe", PROBES)
def test_labels_with_gaps_of_any_whole_type_are_the_same_classes(probe):
    x, y, test, truth = given()
    expected = PROBES[probe](x, y, test, truth)
    assert 0.3 < expected <= 1
    assert PROBES[probe](x, (y * 11).to(torch.uint8), test, (truth * 11).to(torch.int16)) == expected
    assert PROBES[probe](x, y * 100_000, test, truth * 100_000) == expected


def test_settings_that_can_not_be_meant_are_refused():
    tensors = given()
    for k in (0, -1, float("nan"), True):
        with pytest.raises(ValueError, match="k must be a number above 0"):
            knn_accuracy(*tensors, k=k)
    with pytest.raises(ValueError, match="temperature must be a number above 0, got 0"):
        knn_accuracy(*tensors, k=1, temperature=0)
    with pytest.raises(ValueError, match="l2 must be a number above 0, got -1"):
        few_shot_accuracy(*tensors, l2=-1)


def test_choices_of_a_linear_probe_are_looked_at_one_by_one():
    x, y, test, truth = given()
    train, seen = {"a": [x], "b": [x, x[:, :3]]}, {"a": [test], "b": [test, test[:, :3]]}
    assert linear_probe(train, y, seen, truth, l2s=(1e-2,)).choice in "ab"
    with pytest.raises(ValueError, match="test features are a; expected those of train: a, b"):
        linear_probe(train, y, {"a": [test]}, truth)
    with pytest.raises(ValueError, match="test features 'b': 1 parts, expected 2 as train has"):
        linear_probe(train, y, seen | {"b": [test]}, truth)
    with pytest.raises(ValueError, match="train features 'b' must be finite"):
        linear_probe(train | {"b": [x, changed(x[:, :3], float("nan"))]}, y, seen, truth)


def test_images_by_label_are_those_that_have_it():
    labels = torch.randint(0, 50, (200,)) * 3
    found = by_label(labels)
    assert [label for label, _ in found] == sorted(set(labels.tolist()))
    for label, rows in found:
        assert np.array_equal(rows, np.flatnonzero(labels.numpy() == label))
