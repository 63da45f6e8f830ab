"""Autoregressive pretraining: each patch is predicted from those before it (iGPT; AIM, arXiv 2401.08541)."""

import math

import torch
from torch import Tensor

from mpp import draws, targets
from mpp.batch import Batch
from mpp.models.encoder import Encoder
from mpp.models.patch_head import PatchHead
from mpp.models.vit import ViT
from mpp.objectives.autoregressive_config import AutoregressiveConfig
from mpp.objectives.base import Objective
from mpp.objectives.hiding import encoder_of_patches
from mpp.objectives.predicted import precise, target_of


class Autoregressive(Objective):
    """Predicts each patch but the first, row by row, from the encoder's output at the one before it.

    That output knows of itself and what is before it alone. With a random prefix, as AIM has it, so many first patches
    of an image see each other and are seen by all, and those behind them alone are predicted.
    """

    encoder: ViT
    config: AutoregressiveConfig

    def __init__(self, encoder: Encoder, config: AutoregressiveConfig | None = None) -> None:
        config = config or AutoregressiveConfig()
        super().__init__(encoder_of_patches(encoder, config), config)
        shape = self.encoder.config
        if reason := shape.unordered:
            raise ValueError(
                f"objective.name {config.name} predicts each patch from those before it alone, which this encoder "
                f"can't do: {reason}"
            )
        if config.prefix == "none" and shape.pool in ("cls", "cls_avg"):
            raise ValueError(
                f"objective.prefix none shows a class token no patch, and model.pool {shape.pool} reads it; take "
                "model.pool avg or map, or objective.prefix random"
            )
        self.patches = math.prod(shape.grid)
        if self.patches < 2:
            raise ValueError(
                f"objective.name {config.name} needs at least 2 patches, got an image {shape.image} of one patch"
            )
        self.target = target_of(config.target, self.encoder, config.bits, config.grid)
        self.head = PatchHead(config.head, self.encoder, self.target.outputs)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.compute(batch.images, self.draw(len(batch), batch.images.device))

    def draw(self, images: int, device: torch.device) -> Tensor | None:
        """How many first patches of each of that many images see all the others of these, (b,); None for none."""
        if self.config.prefix == "none":
            return None
        return 1 + draws.below(draws.keys(images, device), 1, self.patches - 1).squeeze(1)

    def predict(self, images: Tensor, prefix: Tensor | None) -> Tensor:
        """What is said of the patches 1, 2, ..., n - 1, float32 at least (b, n - 1, outputs)."""
        tokens = self.encoder.encode(self.encoder.embed(images), causal=0 if prefix is None else prefix)
        return precise(self.head(self.encoder.patches(tokens)[:, :-1]))

    def counted(self, prefix: Tensor | None) -> Tensor | None:
        """What each of the predictions (b, n - 1) weighs in the loss; None for all alike.

        The sum over an image's patches behind its prefix is divided by how many these are on the average, n / 2, and
        not by their own number: each counts alike, and in whatever parts a batch goes through.
        """
        if prefix is None:
            return None
        behind = torch.arange(1, self.patches, device=prefix.device) >= prefix.unsqueeze(1)  # (b, n - 1)
        return behind / (len(prefix) * self.patches / 2)

    def compute(self, images: Tensor, prefix: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and what to log, for given lengths of the prefixes (b,)."""
        predicted, weights, truth = self.predict(images, prefix), self.counted(prefix), self.target.truth(images)
        loss = self.target.loss(predicted, truth[:, 1:], weights)
        copied = truth[:, :-1] if self.target.compares else None
        return loss, self.target.metrics(predicted, truth[:, 1:], copied, weights)

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Pictures of the image, of each patch as predicted from the true ones before it, and of what was right.

        The first patch, which is not predicted, is the image's own; a prefix, where there is one, is that patch alone.
        """
        images, patch, grid = batch.images, self.encoder.config.patch, self.encoder.config.grid
        prefix = None
        if self.config.prefix == "random":
            prefix = torch.ones(len(batch), dtype=torch.int64, device=images.device)
        patches, truth = targets.patch_pixels(images, patch), self.target.truth(images)
        guess = self.target.painted(self.predict(images, prefix), truth[:, 1:])
        first = patches[:, :1]
        rows = {
            "input": patches,
            "predicted": torch.cat([first, guess], dim=1),
            "truth": torch.cat([first, self.target.shown(images)[:, 1:]], dim=1),
        }
        return {name: targets.unpatchify(row, patch, grid) for name, row in rows.items()}
