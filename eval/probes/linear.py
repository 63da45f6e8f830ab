"""A linear probe that finds its own features and regularisation, on a hold-out of the training images.

DINOv2's evaluation (dinov2/eval/linear.py) chooses among classifiers on the split that it reports, which is optimistic.
Here the test images are looked at once, by one classifier.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mpp.seeds import permutation

from ..features.extract import LAST, ProbeError
from .given import by_label, check_given
from .logistic import BLOCK, fit, principal_axes
from .task import Row, Task

L2 = tuple(10.0**exponent for exponent in range(1, -7, -1))  # of mean cross-entropy + l2 / 2 * |W|^2; strong ones first
HOLD_OUT = 10  # one in so many training images is held out
ENOUGH = 2000  # held-out images: where a tenth is fewer, other tenths are held out in turn, up to all ten
SEED = 0


@dataclass(frozen=True)
class LinearProbe:
    """What a linear classifier reached, and what was chosen for it without the test images."""

    accuracy: float  # on the test images, in [0, 1]
    held_out: float  # of the chosen features and l2, on held-out training images
    choice: str  # the features it reads
    l2: float  # scikit-learn's C is 1 / (l2 * training images)
    per_class: tuple[float | None, ...]  # accuracy by label; None where the test images have none of a class
    tried: dict[str, float]  # choice -> held-out accuracy at its best l2
    predictions: Tensor = field(repr=False, compare=False)  # labels (n,) of the test images

    def __str__(self) -> str:
        return (
            f"linear: {100 * self.accuracy:.2f} % on the test images "
            f"(held-out training images {100 * self.held_out:.2f} %; {self.choice}, l2 {self.l2:g})"
        )


def rows(task: Task) -> list[Row]:
    """The accuracy of the linear probe on the features and with the l2 that it chose."""
    train, test = task.train, task.test
    found = linear_probe(choices(train.parts), train.labels, choices(test.parts), test.labels)
    facts = {"features": found.choice, "l2": found.l2, "held out": found.held_out}
    return [Row("linear", "top1", found.accuracy, {**facts, "per class": found.per_class, "tried": found.tried})]


def choices(parts: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """The features that a probe chooses among, each as parts that stand side by side.

    As DINOv2's, class token, average patch or both, of the last block or of the last four; and each earlier block's
    average patch, since after masked pretraining, and in small encoders, the last block is seldom the best. A part that
    is none of these is a choice by itself.
    """
    blocks = sorted(int(match[1]) for name in parts if (match := re.fullmatch(r"average (\d+)", name)))
    found = {name: [part] for name, part in parts.items() if not re.fullmatch(r"(average|class) \d+", name)}
    if not blocks:
        return found
    kinds = {"class token": ["class"], "average patch": ["average"], "both": ["class", "average"]}
    if f"class {blocks[-1]}" not in parts:
        kinds = {"average patch": ["average"]}
    for last in sorted({1, min(LAST, len(blocks))}):
        where = "last block" if last == 1 else f"last {last} blocks"
        for kind, names in kinds.items():
            found[f"{kind}, {where}"] = [parts[f"{name} {block}"] for block in blocks[-last:] for name in names]
    for block in reversed(blocks[:-1]):
        found[f"average patch, block {block}"] = [parts[f"average {block}"]]
    return found


def linear_probe(
    train: Tensor | Mapping[str, Sequence[Tensor]],
    train_labels: Tensor,
    test: Tensor | Mapping[str, Sequence[Tensor]],
    test_labels: Tensor,
    *,
    l2s: Sequence[float] = L2,
) -> LinearProbe:
    """Multinomial logistic regression on standardised features (n, d), or on the best of several choices of them.

    train, test: one tensor, or choice -> parts (n, d_i) that stand side by side. Features and l2 are chosen on a tenth
    of the training images, the same share of each class (several tenths in turn if those are few); then all are
    fitted. Beside the features it needs one float32 copy of the widest choice.

    Raises ValueError for features that are not finite or of another shape, and for labels that number no class.
    """
    check_given(train, train_labels, test, test_labels)
    train = {"features": [train]} if isinstance(train, Tensor) else train
    test = {"features": [test]} if isinstance(test, Tensor) else test
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # with float64, which mps lacks
    present, compact = train_labels.unique(return_inverse=True)
    folds = tenths(compact)
    tried = {name: _held_out(parts, compact, folds, l2s, device) for name, parts in train.items()}
    best = {name: max(zip(scores, l2s, strict=True), key=lambda found: found[0]) for name, scores in tried.items()}
    choice = max(best, key=lambda name: best[name][0])  # the first of equals, and its strongest l2
    held_out, l2 = best[choice]
    everything = torch.arange(len(compact))
    [guess] = _predict(train[choice], compact, everything, test[choice], slice(None), (l2,), device)
    guess = present[guess]
    per_class = accuracy_by_class(guess, test_labels)
    scores = {name: score for name, (score, _) in best.items()}
    return LinearProbe((guess == test_labels).double().mean().item(), held_out, choice, l2, per_class, scores, guess)


def accuracy_by_class(guess: Tensor, truth: Tensor) -> tuple[float | None, ...]:
    """The share of each label's images that were guessed right, None where it has no images."""
    right = torch.bincount(truth[guess == truth], minlength=int(truth.max()) + 1).tolist()
    return tuple(
        hit / count if count else None for hit, count in zip(right, torch.bincount(truth).tolist(), strict=True)
    )


def tenths(labels: Tensor) -> list[Tensor]:
    """Disjoint lists of images, each about a tenth of every class; as many of the ten as it takes to hold out enough.

    A class of one image is never held out, so that every class is always fitted.
    """
    fold = np.full(len(labels), -1)
    for label, members in by_label(labels):
        if len(members) > 1:
            order = members[permutation(len(members), SEED, label)]
            fold[order] = (np.arange(len(order)) + label) % HOLD_OUT  # small classes take part in different tenths
    found: list[Tensor] = []
    for number in range(HOLD_OUT):
        if sum(map(len, found)) < ENOUGH and (members := np.flatnonzero(fold == number)).size:
            found.append(torch.from_numpy(members))
    if not found:
        raise ProbeError(
            "linear: no class has two training images, so none can be held out to choose the regularisation by"
        )
    return found


def _held_out(
    parts: Sequence[Tensor], labels: Tensor, folds: list[Tensor], l2s: Sequence[float], device: torch.device
) -> list[float]:
    """The accuracy at each l2 on the images of the folds, each predicted from those outside its fold."""
    right = torch.zeros(len(l2s), dtype=torch.int64)
    for fold in folds:
        rest = torch.ones(len(labels), dtype=torch.bool)
        rest[fold] = False
        guess = _predict(parts, labels, rest.nonzero().flatten(), parts, fold, l2s, device)
        right += (guess == labels[fold]).sum(1)
    return [count / sum(map(len, folds)) for count in right.tolist()]


def _predict(
    train: Sequence[Tensor],
    labels: Tensor,
    rows: Tensor,
    test: Sequence[Tensor],
    test_rows: Tensor | slice,
    l2s: Sequence[float],
    device: torch.device,
) -> Tensor:
    """The labels (l2, m) that classifiers fitted to some rows of `train` give to some rows of `test`."""
    axes = principal_axes(train, rows, device)
    truth = labels[rows].to(device)
    weights = fit(axes.coordinates(train, rows), truth, int(labels.max()) + 1, axes.curvature, l2s)
    seen = axes.coordinates(test, test_rows)
    blocks = seen.split(max(1, BLOCK // weights.shape[2]))
    return torch.stack([torch.cat([(some @ weight.float()).argmax(1) for some in blocks]) for weight in weights]).cpu()
