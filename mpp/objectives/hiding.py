"""What objectives share that hide patches: which ones, and what stands in their place."""

import math

import torch
from torch import Tensor, nn

from mpp import targets
from mpp.masks import MASKS, Grid, random_index, random_order
from mpp.models.encoder import Encoder
from mpp.models.layers import put
from mpp.models.vit import ViT
from mpp.objectives.config import ObjectiveConfig
from mpp.objectives.hiding_config import HidingConfig

STD = 0.02  # of a mask token at first, as of BEiT's, MAE's and SimMIM's


class Hiding:
    """Which patches of a grid an objective hides: always `count`, drawn for each image apart.

    A share that leaves nothing visible or nothing to predict, and a mask that does not fit the grid, are a ValueError
    of one line; nothing is drawn for that, so that the meta device does for a check.
    """

    def __init__(self, config: HidingConfig, grid: Grid) -> None:
        self.grid, self.patches, self.mask = grid, math.prod(grid), MASKS[config.mask]
        self.random = config.mask == "random"
        self.count = self.mask.count(config.share, grid, up=config.up)
        if self.random and config.everything and self.count == self.patches:
            return
        try:
            self.mask.check(grid, self.count)
        except ValueError as error:
            raise ValueError(f"objective.mask {config.mask}, objective.share {config.share:g}: {error}") from None

    def draw(self, images: int, device: torch.device) -> Tensor:
        """The hidden patches of that many images: (b, k) int64."""
        if self.random:  # which masks.random refuses where it hides all
            return random_index(images, self.patches, self.count, device)
        return self.mask.draw(images, self.grid, self.count, device)

    def split(self, images: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The patches that are kept and those that are hidden, (b, n - k) and (b, k): for encoders that see the former
        alone. Where `random` hides them, the first of a random order are kept, as MAE does."""
        if self.random:
            order = random_order(images, self.patches, device)  # (b, n)
            return order[:, : -self.count], order[:, -self.count :]
        hidden = self.draw(images, device)
        places = torch.arange(self.patches, device=device)
        behind = places.expand(images, -1).scatter_add(1, hidden, torch.full_like(hidden, self.patches))  # (b, n)
        return behind.argsort(1)[:, : -self.count], hidden


def encoder_of_patches(encoder: Encoder, config: ObjectiveConfig) -> ViT:
    """The encoder, if it has patches; else a ValueError."""
    if not isinstance(encoder, ViT):
        name = encoder.config.name
        raise ValueError(f"objective.name {config.name} needs an encoder of patches (model.name vit), got {name}")
    return encoder


def mask_token(encoder: ViT) -> nn.Parameter:
    """What is to stand in the place of hidden patches' embeddings: (d,), learned."""
    return nn.Parameter(STD * torch.randn(encoder.config.width))


def embed_without(encoder: ViT, images: Tensor, hidden: Tensor, token: Tensor) -> Tensor:
    """Patch embeddings (b, n, d) of images, with the token (d,) in the place of the hidden ones (b, k).

    Positions are not added yet: `encoder.encode` adds them, to tokens as well.
    """
    if encoder.stem.overlaps:
        images = blanked(encoder, images, hidden)
    return put(encoder.embed(images), hidden, token)


def blanked(encoder: ViT, images: Tensor, hidden: Tensor) -> Tensor:
    """The images, normalised, with hidden patches (b, k) in the mean colour.

    A token of an overlapping stem sees other patches' pixels too, so that to replace embeddings alone would leave the
    answer in its neighbours.
    """
    patch, pixels = encoder.config.patch, encoder.normalise(images)
    patches = targets.patch_pixels(pixels, patch)  # (b, n, p * p * c)
    return targets.unpatchify(put(patches, hidden, pixels.new_zeros(())), patch, encoder.grid(images))
