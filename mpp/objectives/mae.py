"""Masked autoencoding (MAE, arXiv 2111.06377; its code's models_mae.py)."""

from typing import NamedTuple

import torch
from torch import Tensor

from mpp.batch import Batch
from mpp.models.decoder import Decoder
from mpp.models.layers import take
from mpp.models.vit import ViT
from mpp.objectives.base import Objective
from mpp.objectives.hiding import Hiding, encoder_of_patches
from mpp.objectives.mae_config import MAEConfig
from mpp.objectives.painting import rows
from mpp.objectives.predicted import Pixels, precise


class Draw(NamedTuple):
    """Which patches are shown."""

    kept: Tensor  # (b, k), what the encoder sees
    dropped: Tensor  # (b, n - k), what the decoder predicts


class MAE(Objective):
    """Drops most patches, encodes the rest, and predicts the pixels of those dropped by a small decoder.

    The loss is the mean squared error over the dropped patches alone, of pixels as the encoder sees them or, where they
    are normalised once more, less their patch's mean and divided by its deviation.
    """

    encoder: ViT
    config: MAEConfig

    def __init__(self, encoder: ViT, config: MAEConfig | None = None) -> None:
        config = config or MAEConfig()
        super().__init__(encoder, config)
        encoder_of_patches(encoder, config)
        self.hiding = Hiding(config, encoder.config.grid)
        self.target = Pixels(encoder, normalised=config.normalised)
        self.decoder = Decoder(config.decoder, encoder, self.target.outputs)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.compute(batch.images, self.draw(len(batch), batch.images.device))

    def draw(self, images: int, device: torch.device) -> Draw:
        """Draws what is dropped, for that many images."""
        return Draw(*self.hiding.split(images, device))

    def predict(self, images: Tensor, draw: Draw) -> Tensor:
        """The decoder's outputs at the dropped patches, float32 at least (b, n - k, p * p * c)."""
        seen = self.encoder.encode(self.encoder.embed(images, draw.kept), places=draw.kept)  # (b, prefix + k, d)
        return precise(self.decoder(seen, draw.kept, draw.dropped))

    def compute(self, images: Tensor, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and what to log, for a given draw."""
        predicted, truth = self.predict(images, draw), take(self.target.truth(images), draw.dropped)
        return self.target.loss(predicted, truth), self.target.metrics(predicted, truth)

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Pictures of what the encoder is given (chequered where dropped), of the predictions, and of the image."""
        images = batch.images
        draw = self.draw(len(batch), images.device)
        patches = self.target.truth(images)  # (b, n, p * p * c)
        painted = self.target.painted(self.predict(images, draw), take(patches, draw.dropped))
        return rows(images, self.encoder.config.patch, draw.dropped, painted, patches)
