"""An encoder with a head that tells classes apart."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpp.augment.input import Input
from mpp.models.encoder import Encoder


class Head(nn.Module):
    """A linear map to classes that starts at zero, as every head of the ViT paper's code.

    hidden: units of a tanh layer in front, the "pre-logits" of the paper's head for pretraining (section 3.1), or 0.
    """

    def __init__(self, width: int, classes: int, hidden: int = 0) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, hidden) if hidden else None
        self.linear = nn.Linear(hidden or width, classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, vectors: Tensor) -> Tensor:
        """Maps vectors (b, width) to logits (b, classes), float32."""
        vectors = vectors if self.hidden is None else torch.tanh(self.hidden(vectors))
        return self.linear(vectors.to(self.linear.weight.dtype)).float()


class Classifier(nn.Module):
    """What training with labels leaves: `classifier(images)` gives logits (b, classes), float32, one for each name."""

    def __init__(self, encoder: Encoder, head: Head, classes: Sequence[str]) -> None:
        super().__init__()
        self.encoder, self.head, self.classes = encoder, head, tuple(classes)

    @property
    def input(self) -> Input:
        """What it is fed in evaluation."""
        return self.encoder.input

    def prepare(self, *pictures: Any) -> Tensor:
        """Pictures as it is fed them, uint8 (b, c, h, w): see `Encoder.prepare`."""
        return self.encoder.prepare(*pictures)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images))
