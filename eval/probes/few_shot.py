"""Few-shot accuracy by regularised least squares, as big_vision's evaluator does it (evaluators/fewshot_lsr.py).

The ViT paper's few-shot numbers: features are whitened by the mean and standard deviation of the shots, a large
constant feature serves as a hardly regularised bias, targets are +-1, and a ridge regression in closed form is read off
by argmax.
"""

import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mpp.seeds import permutation

from .given import by_label, check_above, check_given
from .task import Row, Task

BIAS = 100.0  # the constant feature
EPSILON = 1e-5  # added to the standard deviation
L2 = 2.0**10  # the evaluator's default
SHOTS = (1, 5, 10, 25)  # images a class; configs/common_fewshot.py
DRAWS = 3
BLOCK = 2**24  # scores computed at a time, for each test image and class: 128 MiB
SEED = 0

logger = logging.getLogger("mpp.eval")


@dataclass(frozen=True)
class FewShot:
    """Accuracies on the test images of classifiers that saw `shots` training images of each class."""

    shots: int
    l2: float
    accuracies: tuple[float, ...]  # one a draw

    @property
    def accuracy(self) -> float:
        return sum(self.accuracies) / len(self.accuracies)


def rows(task: Task) -> list[Row]:
    """The accuracy of each number of shots that all classes have images for."""
    train, test, made = task.train, task.test, list[Row]()
    for name in train.vector_parts:
        for found in few_shot(train.parts[name], train.labels, test.parts[name], test.labels):
            spread = statistics.stdev(found.accuracies) if len(found.accuracies) > 1 else None
            facts = {"features": name, "l2": found.l2, "draws": len(found.accuracies), "sd": spread}
            metric = f"{found.shots}-shot" + ("" if name == train.output else ", average patch")
            made.append(Row("few-shot", metric, found.accuracy, {**facts, "accuracies": found.accuracies}))
    if left_out := [str(shots) for shots in SHOTS if f"{shots}-shot" not in {row.metric for row in made}]:
        logger.warning("few-shot: %s shots left out: a class has fewer training images", ", ".join(left_out))
    return made


def few_shot_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, *, l2: float) -> float:
    """The accuracy on `test` of least squares on all of `train`; features (n, d), labels (n,).

    Raises ValueError for features that are not finite or of another shape, and for labels that number no class.
    """
    check_given(train, train_labels, test, test_labels)
    check_above("l2", l2)
    [guess] = few_shot_predictions(train, train_labels, test, [l2])
    return (guess == test_labels).double().mean().item()


def few_shot_predictions(train: Tensor, train_labels: Tensor, test: Tensor, l2s: Sequence[float]) -> Tensor:
    """The labels (l2, m) of test features (m, d) for each l2, from one decomposition, in float64."""
    x = train.double().cpu()
    std, mean = torch.std_mean(x, 0, correction=0)

    def whitened(features: Tensor) -> Tensor:
        return F.pad((features.double().cpu() - mean) / (std + EPSILON), (0, 1), value=BIAS)

    x = whitened(train)
    present, labels = train_labels.cpu().unique(return_inverse=True)
    images, width = x.shape

    def onto_targets(rows: Tensor) -> Tensor:
        """rows' @ targets for rows (n, r), with targets (n, classes) of 1 and -1 that are never in memory."""
        sums = rows.new_zeros(len(present), rows.shape[1]).index_add_(0, labels, rows)  # (classes, r)
        return (2 * sums - rows.sum(0)).T

    if images >= width:  # (x'x + l2)^-1 x'y
        values, left = torch.linalg.eigh(x.T @ x)
        right = left.T @ onto_targets(x)
    else:  # x' (xx' + l2)^-1 y, the same with a smaller matrix
        values, vectors = torch.linalg.eigh(x @ x.T)
        left, right = x.T @ vectors, onto_targets(vectors)
    weights = [(left / (values + l2)) @ right for l2 in l2s]
    guesses = []
    for some in test.split(max(1, BLOCK // len(present))):
        seen = whitened(some)
        guesses.append(torch.stack([present[(seen @ weight).argmax(1)] for weight in weights]))
    return torch.cat(guesses, dim=1)


def few_shot(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    shots: Sequence[int] = SHOTS,
    l2s: Sequence[float] = (L2,),
    draws: int = DRAWS,
) -> list[FewShot]:
    """Few-shot accuracies for all shots that every class has images for, and for each l2: none is chosen.

    In one draw the images of a smaller number of shots are among those of a larger one.
    """
    fewest = int(torch.bincount(train_labels)[train_labels.unique()].min())
    found = []
    for count in (count for count in shots if count <= fewest):
        guesses = []
        for draw in range(draws):
            rows = drawn(train_labels, count, draw)
            guesses.append(few_shot_predictions(train[rows], train_labels[rows], test, l2s))
        right = (torch.stack(guesses) == test_labels).double().mean(2)  # (draws, l2)
        found += [FewShot(count, l2, tuple(right[:, i].tolist())) for i, l2 in enumerate(l2s)]
    return found


def drawn(labels: Tensor, shots: int, draw: int) -> Tensor:
    """The rows of `shots` images of each class."""
    return torch.from_numpy(
        np.concatenate([rows[permutation(len(rows), SEED, draw, label)[:shots]] for label, rows in by_label(labels)])
    )
