"""Masked patch prediction, the self-supervision of the ViT paper (arXiv 2010.11929, section 4.6, appendix B.1.2)."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from mpp import draws, targets
from mpp.batch import Batch
from mpp.masks import count_of, random_index
from mpp.models.layers import put, take
from mpp.models.vit import ViT
from mpp.objectives.base import Objective
from mpp.objectives.masked_patch_config import MaskedPatchConfig

GREY = torch.tensor(128, dtype=torch.uint8)  # paints [mask] in pictures
LONG = 1024  # patches of an image, from which on a table of all their pairs is not kept
SAMPLE = 64  # patches of such an image on which the guess "nearest" is measured


class Draw(NamedTuple):
    """What happens to which patches."""

    patches: Tensor  # (b, k) the corrupted ones
    fate: Tensor  # (b, k) uniform in [0, 1): the first shares of `split` become [mask], the next another patch
    other: Tensor  # (b, k) the patch whose embedding replaces this one's where fate says so; never itself


class MaskedPatchPrediction(Objective):
    """Predicts the true colours of corrupted patches from the encoder's output at their places.

    A share of the patch embeddings is corrupted, before positions are added: 80 % of those become a learned [mask]
    embedding, 10 % the embedding of another patch of the image, and 10 % stay. The loss counts them all, no others.
    """

    encoder: ViT
    config: MaskedPatchConfig
    order: Tensor  # (n, n), each patch's distances to all; empty for long sequences

    def __init__(self, encoder: ViT, config: MaskedPatchConfig | None = None) -> None:
        if not isinstance(encoder, ViT):
            raise ValueError(
                f"objective.name mpp needs an encoder of patches (model.name vit), got {encoder.config.name}"
            )
        config = config or MaskedPatchConfig()
        super().__init__(encoder, config)
        shape = encoder.config
        if config.target == "pixels":
            outputs = shape.patch**2 * shape.channels
        else:
            if shape.channels != 3:
                raise ValueError(
                    f"objective.target {config.target} needs colour images (model.channels 3, got {shape.channels}); "
                    "pixels takes any"
                )
            if config.target == "colour_grid" and shape.patch % config.grid:
                raise ValueError(f"objective.grid ({config.grid}) must divide model.patch ({shape.patch})")
            outputs = self.cells * 2 ** (3 * config.bits)
        if shape.grid[0] * shape.grid[1] < 2:
            raise ValueError(f"masked patches need at least 2 patches, got an image {shape.image} of one patch")
        self.mask_token = nn.Parameter(0.02 * torch.randn(shape.width))
        self.head = nn.Linear(shape.width, outputs)
        nn.init.zeros_(self.head.weight)  # as every head of the paper's code: the first guess is uniform
        nn.init.zeros_(self.head.bias)
        patches = math.prod(shape.grid)
        table = _order(torch.arange(patches if patches <= LONG else 0), shape.grid).float()
        self.register_buffer("order", table, persistent=False)

    @property
    def cells(self) -> int:
        """Colours predicted for each patch."""
        return self.config.grid**2 if self.config.target == "colour_grid" else 1

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.compute(batch.images, self.draw(len(batch), batch.images.device))

    def draw(self, images: int, device: torch.device) -> Draw:
        """Draws what is corrupted, and how, for that many images."""
        patches = math.prod(self.encoder.config.grid)
        index = random_index(images, patches, count_of(self.config.share, patches), device)
        keys, count = draws.keys(images, device), index.shape[1]
        shift = 1 + draws.below(draws.apart(keys, 0), count, patches - 1)
        return Draw(index, draws.uniform(draws.apart(keys, 1), count), (index + shift) % patches)

    def corrupt(self, tokens: Tensor, draw: Draw, mask: Tensor | None = None) -> Tensor:
        """Replaces patch embeddings (b, n, d) as drawn; with `mask`, what stands in the place of [mask]."""
        mask = self.mask_token if mask is None else mask
        masked, swapped, _ = self.config.split
        fate = draw.fate.unsqueeze(-1)  # (b, k, 1)
        kept_or_other = torch.where(fate < masked + swapped, take(tokens, draw.other), take(tokens, draw.patches))
        return put(tokens, draw.patches, torch.where(fate < masked, mask.to(tokens.dtype), kept_or_other))

    def predict(self, images: Tensor, draw: Draw) -> Tensor:
        """The head's outputs at the corrupted patches, float32 (b, k, outputs)."""
        if self.encoder.stem.overlaps:
            tokens = self.masked(self.encoder.embed(self.without(images, draw)), draw)  # (b, n, d)
        else:
            tokens = self.corrupt(self.encoder.embed(images), draw)  # (b, n, d)
        return self.head(self.encoder.encode(tokens, at=draw.patches)).float()

    def without(self, images: Tensor, draw: Draw) -> Tensor:
        """The images as an overlapping stem may see them, normalised: with corrupted patches of pixels.

        A token of such a stem sees other patches' pixels too, so that to replace embeddings alone would leave the
        answer in its neighbours: masked patches get the mean colour, and swapped ones another patch's pixels.
        """
        patch, pixels = self.encoder.config.patch, self.encoder.normalise(images)
        patches = self.corrupt(targets.patch_pixels(pixels, patch), draw, pixels.new_zeros(()))
        return targets.unpatchify(patches, patch, self.encoder.grid(images))

    def masked(self, tokens: Tensor, draw: Draw) -> Tensor:
        """Replaces those patch embeddings (b, n, d) by [mask] that are to be masked, and no others."""
        fate = draw.fate.unsqueeze(-1)  # (b, k, 1)
        new = torch.where(fate < self.config.split[0], self.mask_token.to(tokens.dtype), take(tokens, draw.patches))
        return put(tokens, draw.patches, new)

    def compute(self, images: Tensor, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and what to log, for a given draw."""
        predicted = self.predict(images, draw)
        if self.config.target == "pixels":
            truth = take(self.true_pixels(images), draw.patches)  # (b, k, p * p * c)
            loss = F.mse_loss(predicted, truth)
            return loss, self.pixel_metrics(images, predicted.detach(), draw)
        colours = self.true_colours(images)  # (b, n, cells)
        logits = rearrange(predicted, "b k (cells colours) -> b k cells colours", cells=self.cells)
        loss = F.cross_entropy(logits.flatten(0, 2), take(colours, draw.patches).flatten())
        return loss, self.colour_metrics(logits.argmax(-1), colours, draw)

    def true_colours(self, images: Tensor) -> Tensor:
        """The classes of each patch's cells: (b, n, cells) int64."""
        if self.config.target == "colour_grid":
            return targets.colour_grid(images, self.encoder.config.patch, self.config.grid, self.config.bits)
        return targets.mean_colour(images, self.encoder.config.patch, self.config.bits).unsqueeze(-1)

    def true_pixels(self, images: Tensor) -> Tensor:
        """The pixels of each patch as the encoder sees them, normalised: (b, n, p * p * c)."""
        return targets.patch_pixels(self.encoder.normalise(images), self.encoder.config.patch)

    def colour_metrics(self, guess: Tensor, colours: Tensor, draw: Draw) -> dict[str, Tensor]:
        """How often colours are right: (b, k, cells) guesses, beside two guesses that need no learning.

        commonest: the colour that is commonest in the batch, everywhere. nearest: the colour of the nearest patch that
        is not corrupted.
        """
        truth = take(colours, draw.patches)  # (b, k, cells)
        counts = torch.zeros(2 ** (3 * self.config.bits), device=truth.device)
        counts.scatter_add_(0, truth.flatten(), torch.ones_like(truth, dtype=counts.dtype).flatten())
        copied = take(colours, self.nearest_visible(draw.patches))  # (b, of k, cells)
        return {
            "accuracy": (guess == truth).float().mean(),
            "commonest": counts.max() / truth.numel(),
            "nearest": (copied == truth[:, : copied.shape[1]]).float().mean(),
        }

    def pixel_metrics(self, images: Tensor, predicted: Tensor, draw: Draw) -> dict[str, Tensor]:
        """For colour images the same figures as `colour_metrics`, of the predicted pixels' mean."""
        if self.encoder.config.channels != 3:
            return {}
        pixels = targets.patch_pixels(images, self.encoder.config.patch)
        guess = self._colour_of(self._to_uint8(predicted))
        return self.colour_metrics(guess.unsqueeze(-1), self._colour_of(pixels).unsqueeze(-1), draw)

    def nearest_visible(self, patches: Tensor) -> Tensor:
        """For corrupted patches (b, k) the nearest that is not; of equally near ones the first in row order.

        Of sequences longer than LONG it gives those of the first SAMPLE patches alone, which come in random order.
        """
        count = math.prod(self.encoder.config.grid)
        hidden = torch.zeros(len(patches), 1, count, device=patches.device)
        hidden = hidden.scatter(2, patches.unsqueeze(1), torch.inf)
        if count <= LONG:
            return (self.order[patches] + hidden).argmin(-1)
        return (_order(patches[:, :SAMPLE], self.encoder.config.grid) + hidden).argmin(-1)

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Pictures of the input, the corrupted input ([mask] is grey), the prediction and the truth.

        Prediction and truth show the target alone in the corrupted patches, and the image elsewhere.
        """
        images, patch = batch.images, self.encoder.config.patch
        draw = self.draw(len(batch), images.device)
        predicted = self.predict(images, draw)
        patches = targets.patch_pixels(images, patch)  # (b, n, p * p * c)
        if self.config.target == "pixels":
            guess, truth = self._to_uint8(predicted), take(patches, draw.patches)
        else:
            logits = rearrange(predicted, "b k (cells colours) -> b k cells colours", cells=self.cells)
            guess = self._painted(logits.argmax(-1))
            truth = self._painted(take(self.true_colours(images), draw.patches))
        painted = {
            "input": patches,
            "corrupted": self.corrupt(patches, draw, GREY.to(images.device)),
            "predicted": put(patches, draw.patches, guess),
            "truth": put(patches, draw.patches, truth),
        }
        grid = self.encoder.grid(images)
        return {name: targets.unpatchify(pixels, patch, grid) for name, pixels in painted.items()}

    def _painted(self, classes: Tensor) -> Tensor:
        """Fills patches with the colours of their cells: (b, k, cells) to uint8 (b, k, p * p * 3)."""
        side = self.encoder.config.patch // int(self.cells**0.5)
        colours = targets.class_colour(classes, self.config.bits)  # (b, k, cells, 3)
        cells = rearrange(colours, "b k (p q) c -> b k p q c", p=int(self.cells**0.5))
        return repeat(cells, "b k p q c -> b k (p r) (q s) c", r=side, s=side).flatten(2)

    def _to_uint8(self, predicted: Tensor) -> Tensor:
        """Normalised pixels (b, k, p * p * c) back to colours."""
        mean, std = self.encoder.mean.flatten(), self.encoder.std.flatten()
        pixels = predicted.unflatten(-1, (-1, len(mean))) * std + mean
        return (255 * pixels).round().clamp(0, 255).to(torch.uint8).flatten(2)

    def _colour_of(self, pixels: Tensor) -> Tensor:
        """The mean colour's class of patches given as pixels: uint8 (b, k, p * p * 3) to (b, k) int64."""
        sums = pixels.unflatten(-1, (-1, 3)).sum(-2, dtype=torch.int64)
        return targets.colour_class(sums, self.encoder.config.patch**2, self.config.bits)


def _order(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Numbers (..., n) that rise with the distance of each patch from the given ones (...), then with its number."""
    everywhere = torch.arange(grid[0] * grid[1], device=patches.device)
    rows = (patches // grid[1]).unsqueeze(-1) - everywhere // grid[1]
    columns = (patches % grid[1]).unsqueeze(-1) - everywhere % grid[1]
    return ((rows.square() + columns.square()) * len(everywhere) + everywhere).double()  # exact up to 2 ** 53
