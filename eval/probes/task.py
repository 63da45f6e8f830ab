"""What a protocol is given, and what it gives. No torch is imported here, since the table of protocols has none."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from mpp.models.encoder import Encoder

    from ..features.extract import Features


@dataclass(frozen=True)
class Row:
    """One figure: a share in [0, 1], and what it takes to read it."""

    protocol: str
    metric: str
    value: float
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """Everything that a protocol may read.

    Most need the features alone: `train.vectors` and `test.vectors` (n, d), which are the encoder's own output, and
    `train.labels`. Only the labels of `train` may be learnt from; those of `test` are for the score, once.
    """

    train: "Features"  # of the images whose labels may be used
    test: "Features"
    encoder: "Encoder"
    shards: str | Path
    train_split: str
    test_split: str
    settings: Mapping[str, Any] = field(default_factory=dict)  # by protocol, where a caller in Python gives any

    def accuracy(self, guess: "Tensor") -> float:
        """The share of the test images whose labels (n,) are guessed right."""
        return (guess.cpu() == self.test.labels).double().mean().item()
