"""The settings of training with labels."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np

from mpp.objectives.config import Metric, Needs, ObjectiveConfig
from mpp.shards.index import Index


@dataclass(frozen=True)
class LabelsConfig(ObjectiveConfig):
    """The defaults regularise nothing. Those of MAE's fine-tuning: smoothing 0.1, mixup 0.8, cutmix 1.0."""

    name: str = "labels"
    classes: tuple[str, ...] = ()  # names by label; those of the shards where not given
    smoothing: float = 0.0  # share of the target spread over all classes (arXiv 1512.00567)
    mixup: float = 0.0  # both parameters of the Beta distribution of the share (arXiv 1710.09412); 0 for none
    cutmix: float = 0.0  # the same (arXiv 1905.04899); with both, each is as likely
    balance: bool = False  # weigh classes by the inverse of their number of images
    weights: tuple[float, ...] = ()  # of the classes in the loss, as torch's cross_entropy takes them; of any scale
    freeze: bool = False  # train the head alone: the encoder stays bit for bit, in eval mode
    hidden: bool = False  # a tanh layer before the last: the paper's head for pretraining

    results = ("encoder", "classifier")
    adjustable = ("smoothing", "mixup", "cutmix", "balance", "weights", "freeze")
    metrics: ClassVar = {"accuracy": Metric("Accuracy", share=True), "top5": Metric("Top-5 accuracy", share=True)}

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"objective.smoothing must be in [0, 1), got {self.smoothing}")
        if min(self.mixup, self.cutmix) < 0:
            raise ValueError(f"objective.mixup and cutmix must be at least 0, got {self.mixup} and {self.cutmix}")
        if self.weights and self.classes and len(self.weights) != len(self.classes):
            raise ValueError(f"objective.weights needs {len(self.classes)} numbers, got {len(self.weights)}")
        if not all(0 <= weight < math.inf for weight in self.weights) or max(self.weights, default=1) <= 0:
            raise ValueError("objective.weights must be at least 0 and finite, and one of them above 0")

    @property
    def frozen(self) -> bool:
        return self.freeze

    @property
    def needs(self) -> Needs:
        return Needs(labels=True, classes=self.classes, pairs=max(self.mixup, self.cutmix) > 0)

    def settled(self, index: Index) -> Self:
        """The classes of the images, and with `balance` their weights: 0 for a class without an image."""
        if self.classes and self.classes != index.classes:
            raise ValueError(
                f"{index.origin}: has {len(index.classes)} classes ({', '.join(index.classes)[:60]}), "
                f"objective.classes are {len(self.classes)} ({', '.join(self.classes)[:60]})"
            )
        weights = self.weights
        if weights and len(weights) != len(index.classes):
            raise ValueError(f"objective.weights needs {len(index.classes)} numbers, one a class, got {len(weights)}")
        if self.balance and not weights:
            counts = np.bincount(index.label[index.label >= 0], minlength=len(index.classes))
            weights = tuple(int(counts.sum()) / count if count else 0.0 for count in counts.tolist())
        return replace(self, classes=index.classes, weights=weights)
