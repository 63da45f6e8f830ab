"""Training with labels: the supervised baseline, fine-tuning, and training from scratch, by cross-entropy."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mpp.batch import Batch
from mpp.mixing import mix, smoothed
from mpp.models.classifier import Classifier, Head
from mpp.models.encoder import Encoder
from mpp.objectives.base import Objective, ObjectiveConfig


@dataclass(frozen=True)
class LabelsConfig(ObjectiveConfig):
    """The defaults regularise nothing. Those of MAE's fine-tuning: smoothing 0.1, mixup 0.8, cutmix 1.0."""

    name: str = "labels"
    classes: tuple[str, ...] = ()  # names by label; those of the shards where not given, written at the first start
    smoothing: float = 0.0  # share of the target spread over all classes (arXiv 1512.00567)
    mixup: float = 0.0  # both parameters of the Beta distribution of the share (arXiv 1710.09412); 0 for none
    cutmix: float = 0.0  # the same (arXiv 1905.04899); with both, each is as likely
    balance: bool = False  # weight classes by the inverse of their number of images
    weights: tuple[float, ...] = ()  # of the classes in the loss; what `balance` found is written here
    hidden: bool = False  # a tanh layer before the last: the paper's head for pretraining

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"objective.smoothing must be in [0, 1), got {self.smoothing}")
        if min(self.mixup, self.cutmix) < 0:
            raise ValueError(f"objective.mixup and cutmix must be at least 0, got {self.mixup} and {self.cutmix}")
        if self.weights and self.classes and len(self.weights) != len(self.classes):
            raise ValueError(f"objective.weights needs {len(self.classes)} numbers, got {len(self.weights)}")
        if min(self.weights, default=1) < 0 or max(self.weights, default=1) <= 0:
            raise ValueError("objective.weights must be at least 0, and one of them above 0")


class Classification(Objective):
    """Predicts the class of an image: cross-entropy with label smoothing, mixup, cutmix and class weights.

    Evaluated, it is plain cross-entropy.
    """

    weights: Tensor  # (classes,), of mean 1 over the classes; empty for none

    def __init__(self, encoder: Encoder, config: LabelsConfig | None = None) -> None:
        super().__init__(encoder)
        self.config = config = config or LabelsConfig()
        self.classes = max(1, len(config.classes))  # a recipe that does not know its shards yet has a head of one
        self.head = Head(encoder.width, self.classes, encoder.width if config.hidden else 0)
        weights = torch.tensor(config.weights)
        self.register_buffer("weights", weights / weights.mean() if len(weights) else weights, persistent=False)

    @property
    def classifier(self) -> Classifier:
        """Encoder and head as one module with the classes' names; its parameters are these."""
        return Classifier(self.encoder, self.head, self.config.classes)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.labels is not None, "a run reads images with labels only"
        if not self.training:
            logits = self.head(self.encoder(batch.images))
            return F.cross_entropy(logits, batch.labels), figures(logits, batch.labels)
        images = self.encoder.normalise(batch.images)
        truth = smoothed(batch.labels, self.classes, self.config.smoothing)  # (b, classes)
        if self.config.mixup or self.config.cutmix:
            images, truth = mix(images, truth, mixup=self.config.mixup, cutmix=self.config.cutmix)
        logits = self.head(self.encoder(images))
        logs = F.log_softmax(logits, dim=1)
        if len(self.weights):
            logs = logs * self.weights
        return -(truth * logs).sum(1).mean(), figures(logits.detach(), batch.labels)


def figures(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Top-1 accuracy, and top-5 where there are more classes. Of mixed images the label is the first one's."""
    found = {"accuracy": (logits.argmax(1) == labels).float().mean()}
    if logits.shape[1] > 5:
        found["top5"] = (logits.topk(5).indices == labels.unsqueeze(1)).any(1).float().mean()
    return found
