"""What a classifier is worth on images with labels: accuracy, loss, calibration, confusion.

Of each batch of logits a few numbers an image are kept, so that memory grows with images and with classes, but not with
one times the other; of the confusion the pairs of classes that occur.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mpp.finite import all_finite
from mpp.shards.classes import displayed

TOP = 5  # classes among which top-5 looks for the true one
BINS = 15  # of equal width, for the calibration error (Guo et al. 2017, arXiv 1706.04599)
WORST = 10  # classes in a table


@dataclass(frozen=True)
class Confusion:
    """Images by true and predicted class: one entry a pair that occurs, in the order of both."""

    true: list[int]
    predicted: list[int]
    images: list[int]

    def of(self, label: int) -> dict[int, int]:
        """What the images of a class are taken for: their number by predicted class."""
        pairs = zip(self.true, self.predicted, self.images, strict=True)
        return {predicted: images for true, predicted, images in pairs if true == label}


@dataclass(frozen=True)
class Answers:
    """What the logits of some images with labels say, (n,) each."""

    labels: Tensor
    guess: Tensor
    confidence: Tensor  # float32 probability of the guess
    loss: Tensor  # float64 cross-entropy
    near: Tensor  # whether the label is among the TOP likeliest
    classes: int


@dataclass(frozen=True)
class Scores:
    """Figures over n images; accuracies are shares in [0, 1], lists are in the order of the classes."""

    n: int
    top1: float
    top5: float | None  # None with 5 classes or fewer, of which any five hold the true one
    loss: float  # mean cross-entropy, nats
    ece: float  # expected calibration error: mean distance of confidence from accuracy
    per_class: list[float | None]  # accuracy on the images of each class; None where there are none
    confusion: Confusion

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
        names = displayed(classes)
        wide = max([len(names[label]) for _, label in worst] + [len("worst classes")])
        lines = [str(self), f"{'worst classes':{wide}}  accuracy  images  most often taken for"]
        for accuracy, label in worst:
            row = self.confusion.of(label)
            wrong = max(((images, -other) for other, images in row.items() if other != label), default=(0, 0))
            taken = f"{names[-wrong[1]]} ({wrong[0]})" if wrong[0] else "-"
            lines.append(f"{names[label]:{wide}}  {100 * accuracy:6.2f} %  {sum(row.values()):6}  {taken}")
        if len(known) > len(worst):
            lines.append(f"and {len(known) - len(worst)} classes with higher accuracy")
        return "\n".join(lines)


def scores(logits: Tensor, labels: Tensor) -> Scores:
    """Scores of logits (n, classes) against labels (n,); images without a label (-1) are not counted."""
    return scored([answers(logits, labels)])


def answers(logits: Tensor, labels: Tensor) -> Answers:
    """What logits (n, classes) say of the images that have a label."""
    logits, labels = logits[labels >= 0].float(), labels[labels >= 0]
    classes = logits.shape[1]
    if not all_finite(logits):
        raise ValueError("scores need finite logits, got NaN or infinity")
    if len(labels) and labels.max() >= classes:
        raise ValueError(f"labels must be below the number of classes ({classes}), got {int(labels.max())}")
    logs = logits.log_softmax(1)
    confidence, guess = logs.max(1)
    loss = -logs.gather(1, labels.unsqueeze(1)).double().squeeze(1)
    near = (logits.topk(min(TOP, classes), dim=1).indices == labels.unsqueeze(1)).any(1)
    return Answers(labels, guess, confidence.exp(), loss, near, classes)


def scored(parts: Sequence[Answers]) -> Scores:
    """The scores of all images of some answers."""
    classes = parts[0].classes
    labels, guess, confidence, loss, near = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("labels", "guess", "confidence", "loss", "near")
    )
    if not len(labels):
        raise ValueError("scores need at least one image with a label, got none")
    right = guess == labels
    images, hits = (torch.bincount(of, minlength=classes).tolist() for of in (labels, labels[right]))
    pairs, counts = (labels * classes + guess).unique(return_counts=True)
    return Scores(
        n=len(labels),
        top1=right.double().mean().item(),
        top5=near.double().mean().item() if classes > TOP else None,
        loss=loss.mean().item(),
        ece=calibration_error(confidence, right),
        per_class=[hit / of if of else None for hit, of in zip(hits, images, strict=True)],
        confusion=Confusion((pairs // classes).tolist(), (pairs % classes).tolist(), counts.tolist()),
    )


def calibration_error(confidence: Tensor, right: Tensor) -> float:
    """The mean of |accuracy - confidence| over bins of confidence (n,), each weighted by its images (equation 3)."""
    edges = torch.linspace(0, 1, BINS + 1, dtype=torch.float64)
    place = torch.bucketize(confidence.double(), edges[1:-1])  # a bin holds its upper edge
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, place, right.double() - confidence.double())
    return (gaps.abs().sum() / len(confidence)).item()
