"""What a classifier is worth on images with labels: accuracy, loss, calibration, confusion."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mpp.errors import shown
from mpp.finite import all_finite

TOP = 5  # classes among which top-5 looks for the true one
BINS = 15  # of equal width, for the calibration error (Guo et al. 2017, arXiv 1706.04599)
WORST = 10  # classes in a table


@dataclass(frozen=True)
class Scores:
    """Figures over n images; accuracies are shares in [0, 1], lists are in the order of the classes."""

    n: int
    top1: float
    top5: float | None  # None with 5 classes or fewer, of which any five hold the true one
    loss: float  # mean cross-entropy, nats
    ece: float  # expected calibration error: mean distance of confidence from accuracy
    per_class: list[float | None]  # accuracy on the images of each class; None where there are none
    confusion: list[list[int]]  # images by true class (rows) and predicted class (columns)

    def __str__(self) -> str:
        top5 = "" if self.top5 is None else f"top-5 {100 * self.top5:.2f} %, "
        calibration = f"calibration error {100 * self.ece:.2f} %"
        return f"top-1 {100 * self.top1:.2f} %, {top5}loss {self.loss:.4f}, {calibration}, n = {self.n}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def table(self, classes: Sequence[str]) -> str:
        """The figures, and under them the classes with the lowest accuracy and what they are most often taken for."""
        known = [(accuracy, label) for label, accuracy in enumerate(self.per_class) if accuracy is not None]
        worst = sorted(known)[:WORST]
        names = [shown(name) for name in classes]
        wide = max([len(names[label]) for _, label in worst] + [len("worst classes")])
        lines = [str(self), f"{'worst classes':{wide}}  accuracy  images  most often taken for"]
        for accuracy, label in worst:
            row = self.confusion[label]
            wrong = max((count, -other) for other, count in enumerate([*row[:label], 0, *row[label + 1 :]]))
            taken = f"{names[-wrong[1]]} ({wrong[0]})" if wrong[0] else "-"
            lines.append(f"{names[label]:{wide}}  {100 * accuracy:6.2f} %  {sum(row):6}  {taken}")
        if len(known) > len(worst):
            lines.append(f"and {len(known) - len(worst)} classes with higher accuracy")
        return "\n".join(lines)


def scores(logits: Tensor, labels: Tensor) -> Scores:
    """Scores of logits (n, classes) against labels (n,); images without a label (-1) are not counted."""
    logits, labels = logits[labels >= 0].float(), labels[labels >= 0]
    n, classes = logits.shape
    if not n:
        raise ValueError("scores need at least one image with a label, got none")
    if not all_finite(logits):
        raise ValueError("scores need finite logits, got NaN or infinity")
    if labels.max() >= classes:
        raise ValueError(f"labels must be below the number of classes ({classes}), got {int(labels.max())}")
    logs = logits.log_softmax(1)
    confidence, guess = logs.max(1)
    right = guess == labels
    confusion = torch.bincount(labels * classes + guess, minlength=classes * classes).reshape(classes, classes)
    images = confusion.sum(1).tolist()
    return Scores(
        n=n,
        top1=right.double().mean().item(),
        top5=_top(logits, labels) if classes > TOP else None,
        loss=-logs.gather(1, labels.unsqueeze(1)).double().mean().item(),
        ece=calibration_error(confidence.exp(), right),
        per_class=[hit / of if of else None for hit, of in zip(confusion.diagonal().tolist(), images, strict=True)],
        confusion=confusion.tolist(),
    )


def _top(logits: Tensor, labels: Tensor) -> float:
    return (logits.topk(TOP, dim=1).indices == labels.unsqueeze(1)).any(1).double().mean().item()


def calibration_error(confidence: Tensor, right: Tensor) -> float:
    """The mean of |accuracy - confidence| over bins of confidence (n,), each weighted by its images (equation 3)."""
    edges = torch.linspace(0, 1, BINS + 1, dtype=torch.float64)
    place = torch.bucketize(confidence.double(), edges[1:-1])  # a bin holds its upper edge
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, place, right.double() - confidence.double())
    return (gaps.abs().sum() / len(confidence)).item()
