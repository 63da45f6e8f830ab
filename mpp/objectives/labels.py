"""Training with labels: the supervised baseline, fine-tuning, and training from scratch, by cross-entropy."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpp.batch import Batch
from mpp.mixing import mix, smoothed
from mpp.models.classifier import Classifier, Head
from mpp.models.encoder import Encoder
from mpp.objectives.base import Objective
from mpp.objectives.labels_config import LabelsConfig


class Classification(Objective):
    """Predicts the class of an image: cross-entropy with label smoothing, mixup, cutmix and class weights.

    Evaluated, it is plain cross-entropy.
    """

    config: LabelsConfig
    weights: Tensor  # (classes,), of mean 1 over the classes; empty for none

    def __init__(self, encoder: Encoder, config: LabelsConfig | None = None) -> None:
        config = config or LabelsConfig()
        super().__init__(encoder, config)
        self.classes = max(1, len(config.classes))  # a recipe that does not know its shards yet has a head of one
        self.head = Head(encoder.width, self.classes, encoder.width if config.hidden else 0)
        weights = torch.tensor(config.weights)
        self.register_buffer("weights", weights / weights.mean() if len(weights) else weights, persistent=False)

    @property
    def classifier(self) -> Classifier:
        """Encoder and head as one module with the classes' names; its parameters are these."""
        return Classifier(self.encoder, self.head, self.config.classes)

    def results(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder, "classifier": self.classifier}

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
