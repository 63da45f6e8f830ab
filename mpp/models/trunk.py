"""The trunk that encoders, decoders and predictors have in common: positions, tokens in front, blocks, a final norm."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from mpp import draws
from mpp.models.causal import check_causal, ordered
from mpp.models.layers import MLP, Drop, Initialised, norm_of, take
from mpp.models.mixers import MIXERS, Places
from mpp.models.positions import POSITIONS
from mpp.models.trunk_config import Grid, TrunkConfig
from mpp.split import is_split


class Block(nn.Module):
    """A pre-norm Transformer block (ViT paper, equations 2 and 3), with any mixer."""

    def __init__(self, config: TrunkConfig, mixer: nn.Module, number: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.part = 1 + 3 * number  # the first of its three parts that draw; 0 is of the tokens before the blocks
        self.norm1 = norm_of(config, config.width)
        self.mixer = mixer
        self.norm2 = norm_of(config, config.width)
        self.mlp = MLP(config)
        self.drop = Drop(config.dropout, drop_path)  # of both branches
        scaled = config.layer_scale is not None
        self.scale1 = nn.Parameter(torch.empty(config.width)) if scaled else None
        self.scale2 = nn.Parameter(torch.empty(config.width)) if scaled else None

    def forward(self, tokens: Tensor, places: Places, at: Tensor | None = None) -> Tensor:
        """Maps tokens (b, n, d) to (b, n, d), or only those at `at` (b, k) to (b, k, d)."""
        keys, part = places.keys, self.part
        mixed = self.mixer(self.norm1(tokens), places, at)
        tokens = tokens if at is None else take(tokens, at)
        tokens = tokens + self.drop(_scaled(mixed, self.scale1), keys, part)
        mapped = self.mlp(self.norm2(tokens), keys, part + 1)
        return tokens + self.drop(_scaled(mapped, self.scale2), keys, part + 2)


def _scaled(branch: Tensor, scale: Tensor | None) -> Tensor:
    """A branch times its LayerScale, in the branch's dtype: autocast casts no product, and the stream would widen."""
    return branch if scale is None else branch * scale.to(branch.dtype)


class Trunk(nn.Module):
    """What is between a ViT's stem and its pool; by itself a decoder or a predictor. Its one verb is `encode`.

    grid: the (rows, columns) of its patches; for others, learned positions are interpolated. context: channels of the
    tokens that the mixer `cross` looks at, where they are not as wide as the trunk's own. front: how many tokens
    `encode` is given to stand in front of the patches, without a place, in a trunk that has none of its own there.
    """

    config: TrunkConfig
    given = 0  # tokens in front that `encode` is given
    always_causal = False  # whether `encode` is causal where it is not told
    activation_checkpointing = False  # recompute a block in the backward pass instead of keeping what it computed

    def __init__(self, config: TrunkConfig, grid: Grid, context: int | None = None, front: int = 0) -> None:
        super().__init__()
        if len(grid) != 2 or min(grid) < 1:
            found = "x".join(map(str, grid))
            raise ValueError(f"a trunk needs (rows, columns), a grid of at least 1x1 patches, got {found}")
        if front and config.prefix:
            own = "class_token" if config.has_class_token else "registers"
            raise ValueError(f"{config.section}.{own}: the tokens in front of this trunk's patches are the encoder's")
        self.given = front
        self.config = replace(config, registers=front) if front else config  # they have no place, as registers
        self._put_together(grid, context)
        self.initialise()

    def _put_together(self, grid: Grid, context: int | None = None) -> None:
        """Makes the parts, for the constructors of trunks and ViTs: the order is that of random draws and of names."""
        config = self.config
        self.own_grid, self.context = grid, context or config.width
        self.prefix = config.prefix  # tokens in front of the patches
        self.positions = POSITIONS[config.positions](config, grid)
        self.class_token = nn.Parameter(torch.empty(config.width)) if config.has_class_token else None
        registers = 0 if self.given else config.registers
        self.registers = nn.Parameter(torch.empty(registers, config.width)) if registers else None
        self.drop = Drop(config.dropout)
        self.norm_pre = norm_of(config, config.width) if config.pre_norm else None
        self.blocks = nn.ModuleList()
        for number, mixer in enumerate(config.mixers):
            drop_path = config.drop_path * number / max(1, config.depth - 1)
            self.blocks.append(Block(config, MIXERS[mixer](config, grid, self.context), number, drop_path))
        self.norm = norm_of(config, config.width)

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

    @overload
    def encode(
        self,
        tokens: Tensor,
        keep: Tensor | None = None,
        *,
        places: Tensor | None = None,
        at: Tensor | None = None,
        layers: None = None,
        grid: Grid | None = None,
        context: Tensor | None = None,
        context_at: Tensor | None = None,
        front: Tensor | None = None,
        causal: int | Tensor | None = None,
    ) -> Tensor: ...

    @overload
    def encode(
        self,
        tokens: Tensor,
        keep: Tensor | None = None,
        *,
        places: Tensor | None = None,
        layers: Sequence[int],
        grid: Grid | None = None,
        context: Tensor | None = None,
        context_at: Tensor | None = None,
        front: Tensor | None = None,
        causal: int | Tensor | None = None,
    ) -> list[Tensor]: ...

    def encode(
        self,
        tokens: Tensor,
        keep: Tensor | None = None,
        *,
        places: Tensor | None = None,
        at: Tensor | None = None,
        layers: Sequence[int] | None = None,
        grid: Grid | None = None,
        context: Tensor | None = None,
        context_at: Tensor | None = None,
        front: Tensor | None = None,
        causal: int | Tensor | None = None,
    ) -> Tensor | list[Tensor]:
        """Runs the blocks on patch tokens (b, n, d): (b, prefix + n, d).

        keep: (b, k) indices of patches; the others are dropped, after positions are added to all n.
        places: (b, k) in the place of `keep` where tokens are (b, k, d), of the patches of these indices alone.
        at: (b, j) indices of patches; gives their outputs alone, (b, j, d) without prefix tokens. Exact, and saves
            what the last block would compute for the others. Those from -prefix on are the tokens in front. With
            `keep` or `places` they still count the patches of the image, and each must be among those.
        layers: block numbers from 0; gives a list of these blocks' outputs (b, prefix + n, d), without the final norm.
        grid: (rows, columns) of the patches where it is not the trunk's own.
        context: (b, m, channels), the tokens that the mixer `cross` looks at. context_at: (b, m) says which patches of
            the grid they are, numbers below 0 for those without a place; needed where positions turn queries and keys.
        front: (b, prefix, d), the tokens in front of the patches, of a trunk that has none of its own (`front` there).
        causal: each patch sees itself and those before it, row by row, and none behind it. But so many first ones,
            (b,) or for all images alike, are seen by every token, and so are those in front of the patches (AIM's
            prefix attention, arXiv 2401.08541, section 3.2). Patches that are not all stand in the order of the image.

        A ViT leaves the final norm to `pool` where that is avg_norm. Raises ValueError for patches that are not all if
        a mixer needs the grid, for `causal` if one shows a patch those behind it, and for what does not fit the
        settings.
        """
        grid = grid or self.own_grid
        self._check(tokens, keep, places, at, layers, grid, context, context_at)
        self._check_front(tokens, front)
        causal = 0 if causal is None and self.always_causal else causal
        if causal is not None:
            check_causal(self.config, tokens, causal)
        positions = self.positions.patches(grid).to(tokens.dtype)  # (n, d), or (1, d)
        if places is not None and len(positions) > 1:
            positions = F.embedding(places, positions)  # (b, k, d)
        tokens = tokens + positions
        index = None
        if keep is not None or places is not None:
            if reason := self.config.needs_grid:
                raise ValueError(f"{reason}, so no patches can be dropped")
            if keep is not None:
                tokens, places = take(tokens, keep), keep
            assert places is not None
            ahead = torch.arange(self.prefix, device=places.device).expand(len(places), -1)
            index = torch.cat([ahead, places + self.prefix], dim=1)  # (b, prefix + k)
        if self.prefix:
            front = self._front().expand(len(tokens), -1, -1) if front is None else front
            tokens = torch.cat([front.to(tokens.dtype), tokens], dim=1)
        # Drawn here and not where they are used, which activation checkpointing does twice.
        keys = draws.keys(len(tokens), tokens.device) if self.training and self.config.drops else None
        tokens = self.drop(tokens, keys)
        if self.norm_pre is not None:
            tokens = self.norm_pre(tokens)
        where = self._places(grid, index, None if context is None else context.to(tokens.dtype), context_at)
        where = (where if causal is None else ordered(where, causal, tokens, index))._replace(keys=keys)
        if layers is not None:
            return self._outputs(tokens, where, layers)
        for block in self.blocks[:-1]:
            tokens = self._run(block, tokens, where)
        if at is not None:
            at = at + self.prefix
            at = at if index is None else rows_of(at, index, self.prefix + math.prod(grid))
        return self.finish(self._run(self.blocks[-1], tokens, where, at))

    def finish(self, tokens: Tensor) -> Tensor:
        """Makes of the last block's output what `encode` gives, (b, prefix + n, d): applies the final norm."""
        return self.norm(tokens)

    def patches(self, tokens: Tensor) -> Tensor:
        """Drops the prefix tokens: (b, prefix + n, d) to (b, n, d)."""
        return tokens[:, self.prefix :]

    def _check(
        self,
        tokens: Tensor,
        keep: Tensor | None,
        places: Tensor | None,
        at: Tensor | None,
        layers: Sequence[int] | None,
        grid: Grid,
        context: Tensor | None,
        context_at: Tensor | None,
    ) -> None:
        """Raises ValueError for arguments of `encode` that do not go together."""
        section, words, crosses = self.config.section, self.config.mixer_words, "cross" in self.config.mixer
        if keep is not None and places is not None:
            raise ValueError("encode takes `keep` or `places`, not both")
        if places is not None and places.shape != tokens.shape[:2]:
            found, expected = tuple(places.shape), tuple(tokens.shape[:2])
            raise ValueError(f"encode needs `places` of shape {expected}, one of each token, got {found}")
        if places is None and grid[0] * grid[1] != tokens.shape[1]:
            raise ValueError(f"{tokens.shape[1]} tokens do not fill a grid of {grid[0]}x{grid[1]} patches; pass grid=")
        if at is not None and layers is not None:
            raise ValueError("encode takes `at` or `layers`, not both")
        for name, index in {"keep": keep, "at": at}.items():
            if index is not None and (index.ndim != 2 or len(index) != len(tokens)):
                found = tuple(index.shape)
                raise ValueError(f"encode needs `{name}` of shape (b, k) for {len(tokens)} images, got {found}")
        if layers is not None and not (layers and all(0 <= layer < len(self.blocks) for layer in layers)):
            raise ValueError(f"encode needs `layers` from 0 to {len(self.blocks) - 1}, got {list(layers)}")
        if crosses and context is None:
            raise ValueError(f"{section}.mixer {words} needs encode(context=...), the tokens that cross looks at")
        if context is None:
            if context_at is not None:
                raise ValueError("encode got `context_at` without the `context` whose places it tells")
            return
        if not crosses:
            raise ValueError(f"encode got a context, and {section}.mixer {words} looks at none; cross does")
        if context.ndim != 3 or len(context) != len(tokens):
            found = tuple(context.shape)
            raise ValueError(f"encode needs a context of shape (b, m, channels) for {len(tokens)} images, got {found}")
        if context.shape[-1] != self.context:
            raise ValueError(f"encode needs a context of {self.context} channels, got {context.shape[-1]}")
        if context_at is not None and context_at.shape != context.shape[:2]:
            found, expected = tuple(context_at.shape), tuple(context.shape[:2])
            raise ValueError(f"encode needs `context_at` of shape {expected}, as its context, got {found}")

    def _check_front(self, tokens: Tensor, front: Tensor | None) -> None:
        """Raises ValueError unless `encode` got the tokens in front that the trunk is to be given."""
        if front is None and not self.given:
            return
        expected = (len(tokens), self.given, tokens.shape[-1])
        if not self.given:
            raise ValueError("encode got `front`, and this trunk has its own tokens in front of the patches, if any")
        if front is None or front.shape != expected:
            found = "none" if front is None else tuple(front.shape)
            raise ValueError(f"encode needs `front` of shape {expected}, the tokens in front of patches, got {found}")

    def _front(self) -> Tensor:
        """The tokens in front of the patches, (prefix, d)."""
        front = [] if self.class_token is None else [(self.class_token + self.positions.class_token()).unsqueeze(0)]
        return torch.cat(front if self.registers is None else [*front, self.registers])

    def _places(self, grid: Grid, index: Tensor | None, context: Tensor | None, context_at: Tensor | None) -> Places:
        """Where the tokens are that run through the blocks: all of the grid, or those of `index` (b, prefix + k)."""
        angles, bias = self.positions.angles(grid), self.positions.bias(grid)
        of_context = None
        if angles is not None and context is not None:
            of_context = self._context_angles(angles, context_at)
        if index is None:
            angles = None if angles is None else angles[None, None]
            return Places(grid, self.prefix, angles, None if bias is None else bias[None], context, of_context)
        if angles is not None:
            angles = angles[index].unsqueeze(1)  # (b, 1, prefix + k, head)
        if bias is not None:
            bias = bias[:, index[:, :, None], index[:, None, :]].transpose(0, 1)  # (b, heads, prefix + k, prefix + k)
        return Places(grid, self.prefix, angles, bias, context, of_context)

    def _context_angles(self, angles: Tensor, context_at: Tensor | None) -> Tensor:
        """The angles of a context's tokens (b, 1, m, head), from those of all (prefix + n, head); 0 without a place."""
        if context_at is None:
            raise ValueError(
                f"{self.config.section}.positions {self.config.positions} turn queries and keys, "
                "which needs encode(context_at=...): the patches that the context's tokens are"
            )
        turned = angles[context_at.clamp(min=0) + self.prefix]  # (b, m, head)
        return (turned * (context_at >= 0).unsqueeze(-1)).unsqueeze(1)

    def _run(self, block: nn.Module, tokens: Tensor, places: Places, at: Tensor | None = None) -> Tensor:
        """Runs a block; with activation checkpointing it keeps the block's input alone and computes the rest again."""
        if not (self.activation_checkpointing and torch.is_grad_enabled()):
            return block(tokens, places, at)
        # What stands in the parameters' place now, a bfloat16 copy perhaps, no longer does in the backward pass.
        now: dict[str, Tensor] = dict(block.named_parameters())
        if any(map(is_split, now.values())):  # a sharded block's stand there whenever it is called
            return checkpoint(block, tokens, places, at, use_reentrant=False)

        def run(tokens: Tensor) -> Tensor:
            return functional_call(block, now, (tokens, places, at))

        return checkpoint(run, tokens, use_reentrant=False)

    def _outputs(self, tokens: Tensor, places: Places, layers: Sequence[int]) -> list[Tensor]:
        outputs = []
        for block in self.blocks[: max(layers) + 1]:
            tokens = self._run(block, tokens, places)
            outputs.append(tokens)
        return [outputs[layer] for layer in layers]


def rows_of(numbers: Tensor, index: Tensor, count: int) -> Tensor:
    """Where each of `numbers` (b, j) stands in `index` (b, k), whose numbers are below `count`: (b, j).

    Raises ValueError for one that is not there, except where that would mean to wait for a device.
    """
    order = torch.arange(index.shape[1], device=index.device).expand_as(index)
    rows = index.new_full((len(index), count), -1).scatter(1, index, order)  # (b, count); -1 can't be gathered
    found = rows.gather(1, numbers)
    known = type(found) is Tensor and found.device.type == "cpu" and not torch.compiler.is_compiling()
    if known and (found < 0).any():
        raise ValueError(
            "encode gives outputs of patches among those that it keeps; `at` has one that is not in `keep`"
        )
    return found
