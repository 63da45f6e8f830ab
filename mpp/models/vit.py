"""The Vision Transformer (arXiv 2010.11929) as three verbs that objectives compose: embed, encode, pool."""

import math
from dataclasses import asdict, replace
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from mpp.models.encoder import Encoder
from mpp.models.layers import take
from mpp.models.pools import POOLS
from mpp.models.positions import Learned, Positions, SinCos2d
from mpp.models.stems import STEMS
from mpp.models.trunk import Trunk
from mpp.models.trunk_config import Grid
from mpp.models.vit_config import ViTConfig

NEAR = 1e-3  # what a table of positions may have lost, saved in float16
FREE = {"image", "resize", "pool", "class_token", "dropout", "drop_path", "mlp"}  # settings that `adopt` lets differ


class ViT(Encoder, Trunk):
    """A Vision Transformer encoder: a trunk with a stem in front and a pool behind.

    `forward(images)` is `pool(encode(embed(images)))`. Images are uint8 (b, c, h, w), of any h and w that the patch
    divides, or float if they are normalised already.
    """

    config: ViTConfig

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        self.width, self.layers, self.always_causal = config.vector, config.depth, config.causal
        self.tokens = config.prefix + math.prod(config.grid)
        self.stem = STEMS[config.stem](config)
        self._put_together(config.grid)
        self.pooling = POOLS[config.pool](config)
        self.initialise()

    def grid(self, images: Tensor) -> Grid:
        """The rows and columns of patches of images (b, c, h, w)."""
        self.check(images)
        height, width = images.shape[-2:]
        if height % self.config.patch or width % self.config.patch:
            raise ValueError(f"image sides must be multiples of the patch ({self.config.patch}), got {height}x{width}")
        return height // self.config.patch, width // self.config.patch

    def embed(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Maps images (b, c, h, w) to patch tokens (b, n, d), still without positions.

        keep: (b, k) indices of patches; gives the tokens of these alone, (b, k, d), for `encode(tokens, places=...)`.
        """
        rows, columns = self.grid(images)
        if keep is None:
            return self.stem(self.normalise(images))
        if self.stem.overlaps:
            return take(self.stem(self.normalise(images)), keep)
        patches = rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", h=rows, w=columns)
        p = self.config.patch
        alone = rearrange(take(patches, keep), "b k (c p q) -> b c p (k q)", p=p, q=p)  # an image of one row of patches
        return self.stem(self.normalise(alone))

    def finish(self, tokens: Tensor) -> Tensor:
        """As a trunk's, but where the pool is avg_norm the final norm is left to it."""
        return tokens if self.config.pool == "avg_norm" else super().finish(tokens)

    def pool(self, tokens: Tensor) -> Tensor:
        """Maps encoded tokens (b, prefix + n, d) to one vector an image (b, width), as `config.pool` says."""
        vectors = self.pooling(tokens)
        return self.norm(vectors) if self.config.pool == "avg_norm" else vectors

    def forward(self, images: Tensor) -> Tensor:
        self.check(images)
        at = None
        if self.config.pool == "cls":  # the last block computes that token's output alone: 3 to 8 % of a pass
            at = torch.full((len(images), 1), -self.prefix, device=images.device)  # counted from the first patch
        return self.pool(self.encode(self.embed(images), grid=self.grid(images), at=at))

    def layer_of(self, parameter: str) -> int:
        """MAE's and BEiT's numbering: stem, positions and class token 0, then the blocks, then norm and pooling."""
        part, *rest = parameter.split(".")
        if part == "blocks":
            return 1 + int(rest[0])
        return self.layers + 1 if part in ("norm", "pooling") else 0

    def resized(self, image: Grid | None = None, patch: int | None = None) -> "ViT":
        """A copy for images (h, w) and patches of another size; positions and a linear stem are resampled for it."""
        return self._copied(replace(self.config, image=image or self.config.image, patch=patch or self.config.patch))

    @torch.no_grad()
    def adopt(self, given: Encoder) -> None:
        """Takes another encoder's weights. `given` says how positions and patches are resampled for other sizes.

        Raises ValueError if a setting that decides the weights' shapes or meaning differs. A class token and attention
        pooling that this encoder does not have are left aside; a final norm in another place than there (avg_norm) and
        pooling that is not there stay as they are drawn, as in MAE's fine-tuning. A learned table that holds just the
        fixed positions of this encoder, as MAE's files have it, is taken for them.
        """
        if not isinstance(given, ViT):
            raise ValueError(f"model: name {given.config.name} there, {self.config.name} here")
        there, here = given.config, self.config
        pairs = {name: (getattr(there, name), getattr(here, name)) for name in asdict(here) if name not in FREE}
        pairs["mlp"] = there.hidden, here.hidden
        if (there.layer_scale is None) == (here.layer_scale is None):  # its first value, which was trained since
            del pairs["layer_scale"]
        if there.depth == here.depth:
            pairs["mixer"] = there.mixers, here.mixers  # however they are given
        if _hold(given.positions, self.positions):
            del pairs["positions"]
        if there.stem != "hybrid":
            del pairs["stages"], pairs["stem_width"]
        if there.stem == "linear":
            del pairs["patch"]
        if here.has_class_token > there.has_class_token:
            pairs["pool"] = there.pool, here.pool
            if here.class_token:
                pairs["class_token"] = there.class_token, here.class_token
        if "mlp" in here.mixer and there.grid != here.grid:
            pairs["image"] = there.image, here.image
        self._refuse(pairs)
        found = given.state_dict()
        found |= {f"positions.{name}": value for name, value in given.positions.resized(here, here.grid).items()}
        if there.patch != here.patch:
            method: Literal["bilinear", "bicubic"] = "bilinear" if there.resize == "bilinear" else "bicubic"
            found |= {f"stem.{name}": value for name, value in given.stem.resized(here.patch, method).items()}
        own = self.state_dict()
        moved = (there.pool == "avg_norm") != (here.pool == "avg_norm")
        fresh = ("norm.",) * moved + ("pooling.",) * (there.pool != here.pool)
        self.load_state_dict({name: own[name] if name.startswith(fresh) else found[name] for name in own})


def _hold(given: Positions, fixed: Positions) -> bool:
    """Whether learned positions are, of their own grid, just these fixed ones; float16 may have rounded them."""
    if not (isinstance(given, Learned) and isinstance(fixed, SinCos2d)):
        return False
    table = fixed.patches(given.grid)
    alike = table.shape == given.patches(given.grid).shape and not given.class_token().any()
    return alike and torch.allclose(given.patches(given.grid).float(), table, rtol=0, atol=NEAR)
