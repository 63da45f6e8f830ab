"""The contract between an objective and the training loop."""

from dataclasses import dataclass

from torch import Tensor, nn

from mpp.batch import Batch
from mpp.models.encoder import Encoder


@dataclass(frozen=True)
class ObjectiveConfig:
    """Settings every objective has: the name under which recipes choose it."""

    name: str


class Objective(nn.Module):
    """What the training loop knows of an objective.

    It owns all that is trained with the encoder: heads, tokens, teachers. Its forward pass computes the loss from
    `self.encoder`'s public verbs; it never calls backward and never waits for the device. Randomness comes from torch's
    global generator, which the loop seeds before every micro-batch.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Gives the loss, a float32 scalar, and detached scalars to log."""
        raise NotImplementedError

    def after_step(self, progress: float) -> None:
        """Called after each optimizer step with the share of the run that is done, in (0, 1]: teachers, schedules."""

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Pictures that show what the objective sees and says: name -> uint8 (b, 3, h, w)."""
        return {}
