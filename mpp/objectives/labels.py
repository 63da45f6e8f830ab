"""Training with labels: the supervised baseline, fine-tuning, and training from scratch, by cross-entropy."""

import math
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpp.batch import Batch
from mpp.errors import counted
from mpp.mixing import mix, smoothed
from mpp.models.classifier import Classifier, Head
from mpp.models.encoder import Encoder
from mpp.objectives.base import Objective
from mpp.objectives.labels_config import LabelsConfig

WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
TINY = 1e-30  # a sum of weights below this counts as this


class Classification(Objective):
    """Predicts the class of an image: cross-entropy with label smoothing, mixup, cutmix and class weights.

    With weights it is torch's weighted mean: divided by the sum of the weights of the batch's labels, however the batch
    is split. Mixing changes that sum by nothing, since it pairs images of one batch. Evaluated, it is plain
    cross-entropy. A label that is no class, -1 ("none") among them, is refused; on a device that would have to be
    waited for it makes the loss NaN, which ends a run at its next log.
    """

    config: LabelsConfig
    weights: Tensor  # (classes,); empty for none

    def __init__(self, encoder: Encoder, config: LabelsConfig | None = None) -> None:
        config = config or LabelsConfig()
        super().__init__(encoder, config)
        self.classes = max(1, len(config.classes))  # a recipe that does not know its shards yet has a head of one
        self.head = Head(encoder.width, self.classes, encoder.width if config.hidden else 0)
        self.register_buffer("weights", torch.tensor(config.weights), persistent=False)
        if config.freeze:
            encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """The mode of all but a frozen encoder, whose batch norm and dropout stay as they are when it is used."""
        super().train(mode)
        if self.config.freeze:
            self.encoder.eval()
        return self

    @property
    def classifier(self) -> Classifier:
        """Encoder and head as one module with the classes' names; its parameters are these."""
        return Classifier(self.encoder, self.head, self.config.classes)

    def results(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder, "classifier": self.classifier}

    def check_batch(self, batch: Batch) -> None:
        labels = batch.labels
        expected = f"0 to {self.classes - 1}, one of {counted(self.classes, 'class', 'classes')}"
        if not self.config.classes:
            expected += " (LabelsConfig.classes names them)"
        if labels is None:
            raise ValueError(f"images without labels; expected each to have one of {expected}")
        if labels.dtype not in WHOLE or labels.shape != (len(batch),):
            found = f"{str(labels.dtype).removeprefix('torch.')} of shape {tuple(labels.shape)}"
            raise ValueError(f"labels are {found}; expected whole numbers (int64) of shape ({len(batch)},), {expected}")
        values = type(labels) is Tensor and labels.device.type == "cpu"  # stand-ins of `mpp plan` have none
        if values and (outside := self._outside(labels)).any():
            place = int(outside.nonzero()[0])
            none = " (none)" if labels[place] == -1 else ""
            raise ValueError(f"image {place} of the batch has label {int(labels[place])}{none}; expected {expected}")

    def batch_weight(self, batch: Batch) -> float | Tensor:
        if not len(self.weights) or not self.training:
            return len(batch)
        assert batch.labels is not None, "check_batch has looked"
        # Of labels 0 alone nothing is learned, and nothing is divided by 0.
        return self.weights[batch.labels.long().clamp(0, self.classes - 1)].sum().clamp(min=TINY)

    def _outside(self, labels: Tensor) -> Tensor:
        return (labels < 0) | (labels >= self.classes)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if not torch.compiler.is_compiling():
            self.check_batch(batch)
        assert batch.labels is not None, "check_batch has looked"
        loss, metrics = self._loss(batch, batch.labels.long())
        if batch.labels.device.type != "cpu" or torch.compiler.is_compiling():
            loss = torch.where(self._outside(batch.labels).any(), math.nan, loss)  # without waiting for the device
        return loss, metrics

    def _loss(self, batch: Batch, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.training:
            logits = self.head(self.encoder(batch.images))
            return F.cross_entropy(logits, labels), figures(logits, labels)
        images = self.encoder.normalise(batch.images)
        truth = smoothed(labels, self.classes, self.config.smoothing)  # (b, classes)
        if self.config.mixup or self.config.cutmix:
            images, truth = mix(images, truth, mixup=self.config.mixup, cutmix=self.config.cutmix)
        logits = self.head(self.encoder(images))
        logs = F.log_softmax(logits, dim=1)
        if len(self.weights):
            return -(truth * logs * self.weights).sum() / self.batch_weight(batch), figures(logits.detach(), labels)
        return -(truth * logs).sum(1).mean(), figures(logits.detach(), labels)


def figures(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Top-1 accuracy, and top-5 where there are more classes. Of mixed images the label is the first one's."""
    found = {"accuracy": (logits.argmax(1) == labels).float().mean()}
    if logits.shape[1] > 5:
        found["top5"] = (logits.topk(5).indices == labels.unsqueeze(1)).any(1).float().mean()
    return found
