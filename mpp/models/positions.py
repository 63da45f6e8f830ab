"""Positions: how the encoder can tell patches apart. A new kind is a class and a line in POSITIONS.

Some are vectors added to the tokens, some turn the queries and keys of attention, some are added to its scores.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mpp.models.position_tables import SINCOS, fixed, plain, rope, rope_capi
from mpp.models.trunk_config import Grid, TrunkConfig

STD = 0.02  # of learned positions (vit_jax, models_vit.py)
DINO_OFFSET = 0.1  # patches by which DINO's code enlarges a grid before it computes the scale


class Positions(nn.Module):
    """Nothing at all, from which each kind overrides what it has. (Alone, as `none`: a bag of patches, ViT table 8.)

    grid: the one that learned tables are for; any other can be asked for. Fixed tables are float32 whatever the
    encoder's dtype; learned ones have the dtype of their parameters.
    """

    place: Tensor

    def __init__(self, config: TrunkConfig, grid: Grid) -> None:
        super().__init__()
        self.config, self.grid = config, grid
        self.register_buffer("place", torch.zeros(1), persistent=False)  # tells the device where there is no parameter

    def patches(self, grid: Grid) -> Tensor:
        """What is added to the patches of a grid: (n, d), or (1, d) zeros where nothing is."""
        return torch.zeros(1, self.config.width, device=self.place.device)

    def class_token(self) -> Tensor:
        """What is added to the class token: (d,), zeros where nothing is."""
        return torch.zeros(self.config.width, device=self.place.device)

    def angles(self, grid: Grid) -> Tensor | None:
        """Angles by which attention turns queries and keys (`turn`), (prefix + n, head size), or None."""
        return None

    def bias(self, grid: Grid) -> Tensor | None:
        """What is added to attention's scores, (heads, prefix + n, prefix + n) for queries by keys, or None."""
        return None

    def resized(self, config: TrunkConfig, grid: Grid) -> dict[str, Tensor]:
        """This module's state_dict for an encoder of that grid, to which learned tables are interpolated.

        What it holds for a class token and registers is left out where `config` has none.
        """
        return {}

    def initialise(self) -> None:
        """Draws initial values."""


class Learned(Positions):
    """A learned vector for each patch, and for the class token one of its own (ViT paper, appendix D.4, "1-D")."""

    def __init__(self, config: TrunkConfig, grid: Grid) -> None:
        super().__init__(config, grid)
        self.first = int(config.has_class_token)  # rows in front of the patches'; registers have none
        self.table = nn.Parameter(torch.empty(self.first + math.prod(grid), config.width))

    def patches(self, grid: Grid) -> Tensor:
        table = self.table[self.first :]
        if grid == self.grid:
            return table
        picture = rearrange(table, "(h w) d -> d h w", h=self.grid[0])
        return rearrange(interpolate(picture, grid, self.config.resize), "d h w -> (h w) d")

    def class_token(self) -> Tensor:
        return self.table[0] if self.first else super().class_token()

    @torch.no_grad()
    def resized(self, config: TrunkConfig, grid: Grid) -> dict[str, Tensor]:
        first = self.table[: self.first if config.has_class_token else 0]
        return {"table": torch.cat([first, self.patches(grid)])}

    def initialise(self) -> None:
        nn.init.normal_(self.table, std=STD)


class Learned2d(Positions):
    """A learned vector for each column and for each row, halves of a patch's own (ViT paper, appendix D.4, "2-D").

    The first half is the column's ("X-embedding"), the second the row's. The class token has a whole one.
    """

    def __init__(self, config: TrunkConfig, grid: Grid) -> None:
        super().__init__(config, grid)
        rows, columns = grid
        self.rows = nn.Parameter(torch.empty(rows, config.width // 2))
        self.columns = nn.Parameter(torch.empty(columns, config.width // 2))
        self.token = nn.Parameter(torch.empty(config.width)) if config.has_class_token else None

    def patches(self, grid: Grid) -> Tensor:
        rows, columns = self._axes(grid)
        picture = torch.cat([columns[None].expand(grid[0], -1, -1), rows[:, None].expand(-1, grid[1], -1)], dim=2)
        return picture.flatten(0, 1)  # (n, d)

    def _axes(self, grid: Grid) -> list[Tensor]:
        """The vectors of the rows and those of the columns, (side, d / 2) each, for another grid by interpolation."""
        tables, how = (self.rows, self.columns), self.config.resize
        pictures = [interpolate(t.T.unsqueeze(2), (side, 1), how) for t, side in zip(tables, grid, strict=True)]
        return [picture.squeeze(2).T for picture in pictures]  # each (d / 2, side, 1) until here

    def class_token(self) -> Tensor:
        return super().class_token() if self.token is None else self.token

    @torch.no_grad()
    def resized(self, config: TrunkConfig, grid: Grid) -> dict[str, Tensor]:
        rows, columns = self._axes(grid)
        token = {"token": self.token.detach()} if self.token is not None and config.has_class_token else {}
        return {"rows": rows.detach(), "columns": columns.detach(), **token}

    def initialise(self) -> None:
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=STD)


class Fixed(Positions):
    """Positions that are computed, once for each grid; that of its own grid is a constant to torch.compile."""

    def __init__(self, config: TrunkConfig, grid: Grid) -> None:
        super().__init__(config, grid)
        self.native = self.make(grid)

    def make(self, grid: Grid) -> Tensor:
        """The table of a grid, float32 on the module's device."""
        raise NotImplementedError

    def table(self, grid: Grid) -> Tensor:
        """The same, without computing it again."""
        return self.native if plain(grid) == self.grid else self.make(grid)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves the module; the table goes to its new device and stays float32, as no buffer would."""
        super()._apply(fn, recurse)
        self.native = self.make(self.grid)
        return self


class SinCos2d(Fixed):
    """Fixed sines and cosines of a patch's column and row; three layouts, after `config.positions`."""

    def make(self, grid: Grid) -> Tensor:
        return fixed(SINCOS[self.config.positions], self.place.device, grid, self.config.width)

    def patches(self, grid: Grid) -> Tensor:
        return self.table(grid)


class Relative(Positions):
    """A learned bias of each head for each offset of query from key, shared by all blocks (BEiT, arXiv 2106.08254).

    `table` (heads, offsets) holds the picture of (2 rows - 1) x (2 columns - 1) offsets row by row, from the key far
    below and right of the query to far above and left. Where there are tokens in front of the patches, three values
    more: of such a query on patches, of patches on such a key, and among such tokens (BEiT's order, transposed).
    """

    def __init__(self, config: TrunkConfig, grid: Grid) -> None:
        super().__init__(config, grid)
        self.sides = offsets(grid)
        self.table = nn.Parameter(torch.empty(config.heads, math.prod(self.sides) + (3 if config.prefix else 0)))

    def bias(self, grid: Grid) -> Tensor:
        rows, columns = grid
        windows = self._picture(grid).unfold(1, rows, 1).unfold(2, columns, 1)  # (heads, query's h w, h w from the end)
        patches = rearrange(windows.flip(3, 4), "heads h w i j -> heads (h w) (i j)")
        if not (prefix := self.config.prefix):
            return patches
        n = rows * columns
        to_patches, to_prefix, among = self.table[:, -3:, None, None].unbind(1)  # (heads, 1, 1) each
        top = torch.cat([among.expand(-1, prefix, prefix), to_patches.expand(-1, prefix, n)], dim=2)
        return torch.cat([top, torch.cat([to_prefix.expand(-1, n, prefix), patches], dim=2)], dim=1)

    def _picture(self, grid: Grid) -> Tensor:
        """The biases of patches on patches, (heads, 2 rows - 1, 2 columns - 1)."""
        picture = self.table[:, : math.prod(self.sides)].unflatten(1, self.sides)
        return interpolate(picture, offsets(grid), self.config.resize)

    @torch.no_grad()
    def resized(self, config: TrunkConfig, grid: Grid) -> dict[str, Tensor]:
        others = self.table[:, math.prod(self.sides) :] if config.prefix else self.table[:, :0]
        return {"table": torch.cat([self._picture(grid).flatten(1), others], dim=1)}

    def initialise(self) -> None:
        nn.init.zeros_(self.table)


class Rope(Fixed):
    """Rotary positions along both axes (DINOv3, arXiv 2508.10104): scores depend on offsets alone."""

    def make(self, grid: Grid) -> Tensor:
        return fixed(rope, self.place.device, grid, self.config.head, self.config.prefix)

    def angles(self, grid: Grid) -> Tensor:
        return self.table(grid)


class RopeCAPI(Rope):
    """CAPI's rotary positions (arXiv 2502.08769, its code's model.py), for its published weights.

    No rotation, strictly: `turn` pairs channel i with i + head / 2, hence one that has the row's angle with one that
    has the column's. For new models take `rope`. CAPI's registers stand around the picture's edge; where patches are
    dropped it moves them to the edge of those that are left, which we do not. It has no class token; ours stays as is.
    """

    def make(self, grid: Grid) -> Tensor:
        config = self.config
        return fixed(rope_capi, self.place.device, grid, config.head, int(config.has_class_token), config.registers)


def offsets(grid: Grid) -> Grid:
    """How many offsets two patches of a grid can have, in rows and in columns."""
    return 2 * grid[0] - 1, 2 * grid[1] - 1


def interpolate(picture: Tensor, grid: Grid, how: str) -> Tensor:
    """Resizes a picture (d, h, w) to (d, *grid), computing in float32 at least.

    bilinear: corners stay corners, as scipy.ndimage.zoom of the ViT paper's code has it. The others keep the edges of
    the outer pixels: bicubic as MAE; bicubic_antialias as timm, and as DINOv2 with registers; bicubic_offset as DINO
    and DINOv2 without, whose scale is that of a grid 0.1 patches larger.
    """
    own, grid = picture.shape[1:], plain(grid)  # PyTorch 2.15 compiles no antialiased gradient of unknown sizes
    if own == grid:
        return picture
    if how == "bicubic_antialias" and grid[1] == 1 < grid[0]:
        return interpolate(picture.mT, (1, grid[0]), how).mT  # PyTorch 2.15 computes a single column wrongly on the CPU
    values = picture[None].to(torch.promote_types(picture.dtype, torch.float32))
    if how == "bilinear":
        values = F.interpolate(values, grid, mode="bilinear", align_corners=True)
    elif how == "bicubic_offset":
        scale = [(side + DINO_OFFSET) / own_side for side, own_side in zip(grid, own, strict=True)]
        values = F.interpolate(values, scale_factor=scale, mode="bicubic", align_corners=False)
    else:
        values = F.interpolate(values, grid, mode="bicubic", align_corners=False, antialias=how == "bicubic_antialias")
    return values[0].to(picture.dtype)


def turn(values: Tensor, angles: Tensor) -> Tensor:
    """Turns channels i and i + d / 2 of queries or keys (b, heads, n, d) by angles that broadcast to (b, 1, n, d)."""
    cos, sin = angles.cos().to(values.dtype), angles.sin().to(values.dtype)
    first, second = values.chunk(2, dim=-1)
    return values * cos + torch.cat([-second, first], dim=-1) * sin


POSITIONS: dict[str, type[Positions]] = {
    "learned": Learned,
    "learned2d": Learned2d,
    **dict.fromkeys(SINCOS, SinCos2d),
    "relative": Relative,
    "rope": Rope,
    "rope_capi": RopeCAPI,
    "none": Positions,
}
