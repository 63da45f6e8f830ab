import json

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, log_loss, top_k_accuracy_score

from mpp.eval.labelled.scores import Confusion, answers, calibration_error, scored, scores


def drawn(n: int = 400, classes: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are right somewhat more often than by chance, and labels in which class 3 does not occur."""
    labels = torch.randint(0, classes - 1, (n,))
    labels[labels >= 3] += 1
    logits = torch.randn(n, classes)
    logits[torch.arange(n), labels] += 1.5
    return logits, labels


def whole(confusion: Confusion, classes: int) -> np.ndarray:
    """The table of all pairs (classes, classes)."""
    table = np.zeros((classes, classes), np.int64)
    for true, predicted, images in zip(confusion.true, confusion.predicted, confusion.images, strict=True):
        table[true, predicted] += images
    return table


def slow_calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Guo et al. 2017, equation 3: bin m of 15 holds confidences in ((m - 1) / 15, m / 15]."""
    total = 0.0
    for m in range(1, 16):
        inside = [i for i, c in enumerate(confidence) if (m - 1) / 15 < c <= m / 15]
        if inside:
            accuracy = sum(right[i] for i in inside) / len(inside)
            total += len(inside) / len(confidence) * abs(accuracy - sum(confidence[i] for i in inside) / len(inside))
    return total


def test_figures_are_scikit_learns():
    logits, labels = drawn()
    found = scores(logits, labels)
    shares = logits.double().softmax(1).numpy()
    truth, every = labels.numpy(), list(range(8))
    assert found.n == 400
    assert found.top1 == pytest.approx(top_k_accuracy_score(truth, shares, k=1, labels=every))
    assert found.top5 == pytest.approx(top_k_accuracy_score(truth, shares, k=5, labels=every))
    assert found.loss == pytest.approx(log_loss(truth, shares, labels=every), rel=1e-5)
    matrix = confusion_matrix(truth, shares.argmax(1), labels=every)
    assert np.array_equal(whole(found.confusion, 8), matrix)
    pairs = list(zip(found.confusion.true, found.confusion.predicted, strict=True))
    assert pairs == sorted(pairs)
    assert min(found.confusion.images) > 0
    assert found.per_class[3] is None
    for label in set(every) - {3}:
        assert found.per_class[label] == pytest.approx(matrix[label, label] / matrix[label].sum())


def test_the_calibration_error_is_guos():
    logits, labels = drawn()
    shares = logits.double().softmax(1).numpy()
    expected = slow_calibration_error(shares.max(1), shares.argmax(1) == labels.numpy())
    assert expected > 0.01
    assert scores(logits, labels).ece == pytest.approx(expected, abs=1e-6)


def test_a_sure_and_right_classifier_is_calibrated_and_a_sure_and_wrong_one_is_not():
    ones = torch.ones(10)
    assert calibration_error(ones, torch.ones(10, dtype=torch.bool)) == pytest.approx(0)
    assert calibration_error(ones, torch.zeros(10, dtype=torch.bool)) == pytest.approx(1)


@pytest.mark.parametrize("size", [1, 7, 399, 400])
def test_scores_do_not_depend_on_how_images_are_batched(size):
    logits, labels = drawn()
    labels[5:20] = -1
    found = scored([answers(*both) for both in zip(logits.split(size), labels.split(size), strict=True)])
    expected = scores(logits, labels)
    assert (found.n, found.top1, found.top5) == (expected.n, expected.top1, expected.top5)
    assert (found.per_class, found.confusion) == (expected.per_class, expected.confusion)
    assert (found.loss, found.ece) == (pytest.approx(expected.loss), pytest.approx(expected.ece, rel=1e-6))


def test_images_without_a_label_are_not_counted():
    logits, labels = drawn(50)
    expected = scores(logits, labels)
    more = torch.cat([logits, torch.randn(20, 8)]), torch.cat([labels, torch.full((20,), -1)])
    assert scores(*more) == expected
    with pytest.raises(ValueError, match="at least one image with a label"):
        scores(torch.randn(3, 4), torch.full((3,), -1))
    with pytest.raises(ValueError, match=r"below the number of classes \(4\), got 4"):
        scores(torch.randn(2, 4), torch.tensor([0, 4]))


def test_there_is_no_top_5_of_five_classes():
    logits, labels = torch.randn(20, 5), torch.randint(0, 5, (20,))
    assert scores(logits, labels).top5 is None
    assert "top-5" not in str(scores(logits, labels))


def test_a_classifier_that_knows_nothing_is_no_better_than_chance_in_the_top_5():
    found = scores(torch.zeros(1000, 10), torch.arange(1000) % 10)
    assert (found.top1, found.top5) == (pytest.approx(0.1), pytest.approx(0.5))


def test_json_holds_all_figures():
    logits, labels = drawn()
    found = scores(logits, labels)
    values = json.loads(json.dumps(found.to_json()))
    assert values.keys() == {"n", "top1", "top5", "loss", "ece", "per_class", "confusion"}
    assert whole(Confusion(**values["confusion"]), 8).sum() == found.n == 400


def test_the_table_puts_the_worst_class_first_with_what_it_is_taken_for():
    guesses = torch.tensor([0, 0, 0, 1, 1, 0, 2, 0, 0, 1])
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 2])
    table = scores(torch.eye(4)[guesses] * 9, labels).table(["ant", "bee", "cat\n", "dog"])
    lines = table.splitlines()
    assert lines[0].startswith("top-1 60.00 %, loss")
    assert [line.split()[0] for line in lines[2:]] == ["'cat\\n'", "bee", "ant"]  # and no dog, which does not occur
    assert lines[2].split()[1:] == ["25.00", "%", "4", "ant", "(2)"]
    assert lines[4].split()[1:] == ["100.00", "%", "3", "-"]


def test_the_table_of_many_classes_stays_short():
    labels = torch.arange(300) % 100
    table = scores(torch.randn(300, 100), labels).table([f"c{i}" for i in range(100)])
    assert len(table.splitlines()) == 2 + 10 + 1
    assert table.endswith("and 90 classes with higher accuracy")
