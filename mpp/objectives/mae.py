"""Masked autoencoding (MAE, arXiv 2111.06377; its code's models_mae.py)."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mpp import targets
from mpp.batch import Batch
from mpp.masks import random_order
from mpp.models.decoder import Decoder
from mpp.models.layers import put, take
from mpp.models.vit import ViT
from mpp.objectives.base import Objective
from mpp.objectives.mae_config import MAEConfig

EPS = 1e-6  # added to the variance of a patch's pixels (models_mae.py)
GREY = 128  # paints dropped patches in pictures
EXACT = 1e-10  # the least error that is told from none, on pixels of [0, 1]: 100 dB


class Draw(NamedTuple):
    """Which patches are shown."""

    kept: Tensor  # (b, k), what the encoder sees
    dropped: Tensor  # (b, n - k), what the decoder predicts


class Pixels(NamedTuple):
    """The true pixels of the dropped patches, (b, n - k, p * p * c), and for each patch the scale of its prediction."""

    truth: Tensor  # as the encoder sees pixels, normalised
    mean: Tensor  # (b, n - k, 1) of a patch's pixels
    std: Tensor  # (b, n - k, 1), unbiased


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
        if not isinstance(encoder, ViT):
            raise ValueError(
                f"objective.name mae needs an encoder of patches (model.name vit), got {encoder.config.name}"
            )
        shape = encoder.config
        self.patches = math.prod(shape.grid)
        self.kept = config.kept(self.patches)
        self.decoder = Decoder(config.decoder, encoder, shape.patch**2 * shape.channels)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.compute(batch.images, self.draw(len(batch), batch.images.device))

    def draw(self, images: int, device: torch.device) -> Draw:
        """Draws what is dropped, for that many images."""
        order = random_order(images, self.patches, device)  # (b, n)
        return Draw(order[:, : self.kept], order[:, self.kept :])

    def predict(self, images: Tensor, draw: Draw) -> Tensor:
        """The decoder's outputs at the dropped patches, float32 at least (b, n - k, p * p * c)."""
        seen = self.encoder.encode(self.encoder.embed(images), draw.kept)  # (b, prefix + k, d)
        return precise(self.decoder(seen, draw.kept, draw.dropped))

    def pixels(self, images: Tensor, draw: Draw) -> Pixels:
        """The true pixels of the dropped patches."""
        patches = targets.patch_pixels(precise(self.encoder.normalise(images)), self.encoder.config.patch)
        truth = take(patches, draw.dropped)
        variance, mean = torch.var_mean(truth, dim=-1, keepdim=True)
        return Pixels(truth, mean, (variance + EPS).sqrt())

    def compute(self, images: Tensor, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and what to log, for a given draw."""
        predicted, pixels = self.predict(images, draw), self.pixels(images, draw)
        target = (pixels.truth - pixels.mean) / pixels.std if self.config.normalised else pixels.truth
        loss = F.mse_loss(predicted, target)
        return loss, {
            "psnr": self._psnr(self.painted(predicted.detach(), pixels) - pixels.truth),
            "flat": self._psnr(pixels.mean - pixels.truth),
        }

    def painted(self, predicted: Tensor, pixels: Pixels) -> Tensor:
        """Predictions as pixels that the encoder sees: normalised ones with their patch's true mean and deviation."""
        return predicted * pixels.std + pixels.mean if self.config.normalised else predicted

    def _psnr(self, error: Tensor) -> Tensor:
        """Decibels of errors (b, k, p * p * c) of normalised pixels, the peak being white."""
        std = self.encoder.std.flatten()
        squares = (error.unflatten(-1, (-1, len(std))) * std).square().mean()
        return -10 * squares.clamp(min=EXACT).log10()

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Pictures of what the encoder is given (dropped patches are grey), of the predictions, and of the image."""
        images, patch, grid = batch.images, self.encoder.config.patch, self.encoder.config.grid
        draw = self.draw(len(batch), images.device)
        painted = self.painted(self.predict(images, draw), self.pixels(images, draw))
        patches = targets.patch_pixels(images, patch)  # (b, n, p * p * c)
        rows = {
            "seen": put(patches, draw.dropped, torch.full_like(patches[:, : self.patches - self.kept], GREY)),
            "predicted": put(patches, draw.dropped, self._to_uint8(painted)),
            "truth": patches,
        }
        return {name: targets.unpatchify(row, patch, grid) for name, row in rows.items()}

    def _to_uint8(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (b, k, p * p * c) back to colours."""
        mean, std = self.encoder.mean.flatten(), self.encoder.std.flatten()
        colours = pixels.unflatten(-1, (-1, len(mean))) * std + mean
        return (255 * colours).round().clamp(0, 255).to(torch.uint8).flatten(2)


def precise(values: Tensor) -> Tensor:
    """Values in float32 at least, whatever the precision they were computed in."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
