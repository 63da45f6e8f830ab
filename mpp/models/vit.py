"""The Vision Transformer (arXiv 2010.11929) as three verbs that objectives compose: embed, encode, pool."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from mpp.models.encoder import Encoder
from mpp.models.layers import MLP, DropPath, Initialised, dropout_of, norm_of, take
from mpp.models.mixers import MIXERS, Places
from mpp.models.pools import POOLS
from mpp.models.positions import POSITIONS
from mpp.models.stems import STEMS
from mpp.models.vit_config import ON_GRID, Grid, ViTConfig

FREE = {"image", "resize", "pool", "class_token", "dropout", "drop_path", "mlp"}  # settings that `adopt` lets differ


class Block(nn.Module):
    """A pre-norm Transformer block (ViT paper, equations 2 and 3), with any mixer."""

    def __init__(self, config: ViTConfig, mixer: str, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = norm_of(config, config.width)
        self.mixer = MIXERS[mixer](config)
        self.norm2 = norm_of(config, config.width)
        self.mlp = MLP(config)
        path = DropPath(drop_path) if drop_path else nn.Identity()
        self.drop = nn.Sequential(dropout_of(config.dropout), path)  # of both branches
        scaled = config.layer_scale is not None
        self.scale1 = nn.Parameter(torch.empty(config.width)) if scaled else None
        self.scale2 = nn.Parameter(torch.empty(config.width)) if scaled else None

    def forward(self, tokens: Tensor, places: Places, at: Tensor | None = None) -> Tensor:
        """Maps tokens (b, n, d) to (b, n, d), or only those at `at` (b, k) to (b, k, d)."""
        mixed = self.mixer(self.norm1(tokens), places, at)
        tokens = tokens if at is None else take(tokens, at)
        tokens = tokens + self.drop(mixed if self.scale1 is None else mixed * self.scale1)
        mapped = self.mlp(self.norm2(tokens))
        return tokens + self.drop(mapped if self.scale2 is None else mapped * self.scale2)


class ViT(Encoder):
    """A Vision Transformer encoder.

    `forward(images)` is `pool(encode(embed(images)))`. Images are uint8 (b, c, h, w), of any h and w that the patch
    divides, or float if they are normalised already.
    """

    config: ViTConfig

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        self.width, self.layers = config.width, config.depth
        self.prefix = config.prefix  # tokens in front of the patches
        self.tokens = self.prefix + config.grid[0] * config.grid[1]
        self.stem = STEMS[config.stem](config)
        self.positions = POSITIONS[config.positions](config)
        self.class_token = nn.Parameter(torch.empty(config.width)) if config.has_class_token else None
        self.registers = nn.Parameter(torch.empty(config.registers, config.width)) if config.registers else None
        self.dropout = dropout_of(config.dropout)
        rates = [config.drop_path * number / max(1, config.depth - 1) for number in range(config.depth)]
        self.blocks = nn.ModuleList(
            Block(config, mixer, rate) for mixer, rate in zip(config.mixers, rates, strict=True)
        )
        self.norm = norm_of(config, config.width)
        self.pooling = POOLS[config.pool](config)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Draws the paper's initial weights (its code's models_vit.py; flax's defaults where that is silent)."""
        if self.class_token is not None:
            nn.init.zeros_(self.class_token)
        if self.registers is not None:
            nn.init.normal_(self.registers, std=0.02)
        for module in self.modules():
            if module is not self and isinstance(module, Initialised):
                module.initialise()
        for name, parameter in self.named_parameters():
            if name.endswith((".scale1", ".scale2")):
                nn.init.constant_(parameter, self.config.layer_scale or 1.0)

    def grid(self, images: Tensor) -> Grid:
        """The rows and columns of patches of images (b, c, h, w)."""
        channels, height, width = images.shape[-3:]
        if channels != self.config.channels:
            raise ValueError(f"the encoder takes {self.config.channels} channels, got images with {channels}")
        if height % self.config.patch or width % self.config.patch:
            raise ValueError(f"image sides must be multiples of the patch ({self.config.patch}), got {height}x{width}")
        return height // self.config.patch, width // self.config.patch

    def embed(self, images: Tensor) -> Tensor:
        """Maps images (b, c, h, w) to patch tokens (b, n, d), still without positions."""
        self.grid(images)
        return self.stem(self.normalise(images))

    def encode(
        self,
        tokens: Tensor,
        keep: Tensor | None = None,
        *,
        at: Tensor | None = None,
        layers: Sequence[int] | None = None,
        grid: Grid | None = None,
    ) -> Any:
        """Runs the blocks on patch tokens (b, n, d): (b, prefix + n, d).

        keep: (b, k) indices of patches; the others are dropped, after positions are added to all n.
        at: (b, k) indices of patches; gives their outputs alone, (b, k, d) without prefix tokens. Exact, and saves
            what the last block would compute for the others. Those from -prefix on are the tokens in front.
        layers: block numbers from 0; gives a list of these blocks' outputs (b, prefix + n, d), without the final norm.
        grid: (rows, columns) of the patches where it is not the config's.

        The final norm is left to `pool` where that is avg_norm. Raises ValueError for `keep` if a mixer needs the grid.
        """
        grid = grid or self.config.grid
        if grid[0] * grid[1] != tokens.shape[1]:
            raise ValueError(f"{tokens.shape[1]} tokens do not fill a grid of {grid[0]}x{grid[1]} patches; pass grid=")
        if at is not None and (keep is not None or layers is not None):
            raise ValueError("encode takes `at` with neither `keep` nor `layers`")
        tokens = tokens + self.positions.patches(grid).to(tokens.dtype)
        if keep is not None:
            if needy := [name for name in self.config.mixer if name in ON_GRID]:
                raise ValueError(f"model.mixer {needy[0]} needs the whole grid, so no patches can be dropped")
            tokens = take(tokens, keep)
        if self.prefix:
            tokens = torch.cat([self._front().to(tokens.dtype).expand(len(tokens), -1, -1), tokens], dim=1)
        tokens = self.dropout(tokens)
        places = self._places(grid, keep)
        if layers is not None:
            return self._outputs(tokens, places, layers)
        for block in self.blocks[:-1]:
            tokens = self._run(block, tokens, places)
        last = self._run(self.blocks[-1], tokens, places, None if at is None else at + self.prefix)
        return self.finish(last)

    def finish(self, tokens: Tensor) -> Tensor:
        """Makes of the last block's output what `encode` gives, (b, prefix + n, d): applies the final norm, or not."""
        return tokens if self.config.pool == "avg_norm" else self.norm(tokens)

    def _front(self) -> Tensor:
        """The tokens in front of the patches, (prefix, d)."""
        front = [] if self.class_token is None else [(self.class_token + self.positions.class_token()).unsqueeze(0)]
        return torch.cat(front if self.registers is None else [*front, self.registers])

    def _places(self, grid: Grid, keep: Tensor | None) -> Places:
        """Where the tokens are that run through the blocks: all of the grid, or those of `keep` (b, k)."""
        angles, bias = self.positions.angles(grid), self.positions.bias(grid)
        if keep is None:
            angles = None if angles is None else angles[None, None]
            return Places(grid, self.prefix, angles, None if bias is None else bias[None])
        front = torch.arange(self.prefix, device=keep.device).expand(len(keep), -1)
        index = torch.cat([front, keep + self.prefix], dim=1)  # (b, prefix + k)
        if angles is not None:
            angles = angles[index].unsqueeze(1)  # (b, 1, prefix + k, head)
        if bias is not None:
            bias = bias[:, index[:, :, None], index[:, None, :]].transpose(0, 1)  # (b, heads, prefix + k, prefix + k)
        return Places(grid, self.prefix, angles, bias)

    def _run(self, block: nn.Module, tokens: Tensor, places: Places, at: Tensor | None = None) -> Tensor:
        """Runs a block; with activation checkpointing it keeps the block's input alone and computes the rest again."""
        if not (self.activation_checkpointing and torch.is_grad_enabled()):
            return block(tokens, places, at)
        # What stands in the parameters' place now, a bfloat16 copy perhaps, no longer does in the backward pass.
        now: dict[str, Tensor] = dict(block.named_parameters())

        def run(tokens: Tensor) -> Tensor:
            return functional_call(block, now, (tokens, places, at))

        return checkpoint(run, tokens, use_reentrant=False)

    def _outputs(self, tokens: Tensor, places: Places, layers: Sequence[int]) -> list[Tensor]:
        outputs = []
        for block in self.blocks[: max(layers) + 1]:
            tokens = self._run(block, tokens, places)
            outputs.append(tokens)
        return [outputs[layer] for layer in layers]

    def patches(self, tokens: Tensor) -> Tensor:
        """Drops the prefix tokens: (b, prefix + n, d) to (b, n, d)."""
        return tokens[:, self.prefix :]

    def pool(self, tokens: Tensor) -> Tensor:
        """Maps encoded tokens (b, prefix + n, d) to one vector an image (b, d), as `config.pool` says."""
        vectors = self.pooling(tokens)
        return self.norm(vectors) if self.config.pool == "avg_norm" else vectors

    def forward(self, images: Tensor) -> Tensor:
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
        config = replace(self.config, image=image or self.config.image, patch=patch or self.config.patch)
        copy = ViT(config)
        copy.adopt(self)
        return copy

    @torch.no_grad()
    def adopt(self, given: Encoder) -> None:
        """Takes another encoder's weights. `given` says how positions and patches are resampled for other sizes.

        Raises ValueError if a setting that decides the weights' shapes or meaning differs. A class token and attention
        pooling that this encoder does not have are left aside; a final norm in another place than there (avg_norm) and
        pooling that is not there stay as they are drawn, as in MAE's fine-tuning.
        """
        if not isinstance(given, ViT):
            raise ValueError(f"model: name {given.config.name} there, {self.config.name} here")
        there, here = given.config, self.config
        pairs = {name: (getattr(there, name), getattr(here, name)) for name in asdict(here).keys() - FREE}
        pairs["mlp"] = there.hidden, here.hidden
        pairs["layer_scale"] = there.layer_scale is not None, here.layer_scale is not None  # trained since: any value
        if there.depth == here.depth:
            pairs["mixer"] = there.mixers, here.mixers  # however they are given
        if there.stem != "hybrid":
            del pairs["stages"]
        if there.stem == "linear":
            del pairs["patch"]
        if here.has_class_token > there.has_class_token:
            pairs["pool"] = there.pool, here.pool
        if "mlp" in here.mixer and there.grid != here.grid:
            pairs["image"] = there.image, here.image
        self._refuse(pairs)
        found = given.state_dict()
        found |= {f"positions.{name}": value for name, value in given.positions.resized(here).items()}
        if there.patch != here.patch:
            method: Literal["bilinear", "bicubic"] = "bilinear" if there.resize == "bilinear" else "bicubic"
            found |= {f"stem.{name}": value for name, value in given.stem.resized(here.patch, method).items()}
        own = self.state_dict()
        moved = (there.pool == "avg_norm") != (here.pool == "avg_norm")
        fresh = ("norm.",) * moved + ("pooling.",) * (there.pool != here.pool)
        self.load_state_dict({name: own[name] if name.startswith(fresh) else found[name] for name in own})
