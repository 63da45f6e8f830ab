"""The contract between an objective and the training loop."""

import torch
from torch import Tensor, nn

from mpp.batch import Batch
from mpp.models.encoder import Encoder
from mpp.objectives.config import Needs, ObjectiveConfig
from mpp.optim import Scale


class Objective(nn.Module):
    """What the training loop knows of an objective.

    It owns all that is trained with the encoder: heads, tokens, teachers. Its forward pass computes the loss from
    `self.encoder`'s public verbs; it never calls backward and never waits for the device. What it draws, it draws for
    each image by mpp.draws (or mpp.masks), which the loop prepares for every micro-batch.

    The encoder comes with the weights that it starts from, so that a teacher copied in the constructor has them too.
    """

    progress: Tensor  # float32 scalar on the device: the share of the run that is done, in [0, 1), also after a resume

    def __init__(self, encoder: Encoder, config: ObjectiveConfig | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = config or ObjectiveConfig(name=type(self).__name__.lower())
        self.register_buffer("progress", torch.zeros(()), persistent=False)
        if self.needs.drops_patches and (reason := encoder.undroppable):
            raise ValueError(f"objective.name {self.config.name} drops patches, which this encoder can't: {reason}")

    @property
    def needs(self) -> Needs:
        """What it asks of the data, the loop and the encoder."""
        return self.config.needs

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Gives the loss, a float32 scalar, and detached scalars to log."""
        raise NotImplementedError

    def check_batch(self, batch: Batch) -> None:
        """Raises ValueError for a batch that it can't learn from; called before that goes to the device, with its parts
        still on the CPU, if they come so. It looks at nothing that lies on another device, for that would wait."""

    def batch_weight(self, batch: Batch) -> float | Tensor:
        """What the mean that is a batch's loss was divided by: where parts of a batch go through one by one, the loss
        of the whole is the mean of theirs by these weights. Its images, unless the objective weighs them."""
        return len(batch)

    def after_step(self, progress: float) -> None:
        """Called after each optimizer step with the share of the run that is done, in (0, 1]: teachers."""

    def scale(self, parameter: str) -> Scale:
        """By how much the learning rate and weight decay of a parameter of this name differ from the recipe's."""
        return Scale()

    def vectors(self, images: Tensor) -> Tensor:
        """What the encoder that would be the result now makes of images (b, c, h, w): (b, width). Not to be overridden,
        but of a sharded objective it is one of the calls around which weights are gathered."""
        return self.results()["encoder"](images)

    def results(self) -> dict[str, nn.Module]:
        """What training leaves: an `encoder`, which may be a teacher, and perhaps more; the config names the same."""
        return {"encoder": self.encoder}

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Pictures that show what the objective sees and says: name -> uint8 (b, 3, h, w)."""
        return {}
