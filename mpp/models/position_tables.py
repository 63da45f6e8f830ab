"""Fixed positions as tables: a function each from a grid to numbers, and the tables that are kept."""

import math
import operator
from collections.abc import Callable

import torch
from torch import Tensor

from mpp.models.trunk_config import Grid

SINCOS_BASE = 10_000.0  # longest wave, in 2 pi patches
ROPE_BASE = 100.0  # longest period, half the picture's side being 1 (DINOv3's layers/rope_position_encoding.py)
CAPI_FREQUENCIES = 7.0, 7e-4  # highest and lowest, in turns from edge to edge (CAPI's model.py)
MOST_TABLES = 32  # kept at once; a long run sees few grids
TABLES: dict[tuple[object, ...], Tensor] = {}


def fixed(make: Callable[..., Tensor], device: torch.device, grid: Grid, *sizes: int) -> Tensor:
    """`make(grid, *sizes)` in float32 on a device, computed once for all encoders; in compiled code each time."""
    grid = plain(grid)
    if torch.compiler.is_compiling():
        return make(grid, *sizes).to(device, torch.float32)
    key = (make, device, *grid, *sizes)
    if (table := TABLES.get(key)) is not None:
        return table
    with torch.inference_mode(False):  # a table made while evaluating must serve training
        table = make(grid, *sizes).to(device, torch.float32)
    if type(table) is Tensor:  # and not the stand-in of a tracer
        if len(TABLES) >= MOST_TABLES:
            TABLES.pop(next(iter(TABLES)))
        TABLES[key] = table
    return table


def plain(grid: Grid) -> Grid:
    """The grid in numbers that torch.compile knows (and compiles again for others), even if it traces any size."""
    return operator.index(grid[0]), operator.index(grid[1])


def steps(count: int) -> Tensor:
    """0, 1, ..., in float64, in which all fixed tables are computed; not on the "meta" device, where it is default."""
    return torch.arange(count, dtype=torch.float64, device="cpu")


def product(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """The row's and the column's coordinate of each patch, (n, 1) both, row by row."""
    return rows.repeat_interleave(len(columns))[:, None], columns.repeat(len(rows))[:, None]


def sincos2d(grid: Grid, width: int) -> Tensor:
    """(n, width): sin x, cos x, sin y, cos y, the lowest frequency being 1 / 10,000 (big_vision, models/vit.py)."""
    omega = SINCOS_BASE ** -(steps(width // 4) / max(1, width // 4 - 1))
    y, x = product(*map(steps, grid))
    return torch.cat([(x * omega).sin(), (x * omega).cos(), (y * omega).sin(), (y * omega).cos()], dim=1)


def sincos2d_mae(grid: Grid, width: int) -> Tensor:
    """(n, width): the same layout, the lowest frequency a step above 1 / 10,000 (MAE, util/pos_embed.py)."""
    omega = SINCOS_BASE ** -(steps(width // 4) / (width // 4))
    y, x = product(*map(steps, grid))
    return torch.cat([(x * omega).sin(), (x * omega).cos(), (y * omega).sin(), (y * omega).cos()], dim=1)


def sincos2d_timm(grid: Grid, width: int) -> Tensor:
    """(n, width): sin y, sin x, cos y, cos x, with MAE's frequencies (timm, layers/pos_embed_sincos.py)."""
    sin_x, cos_x, sin_y, cos_y = sincos2d_mae(grid, width).chunk(4, dim=1)
    return torch.cat([sin_y, sin_x, cos_y, cos_x], dim=1)


def rope(grid: Grid, head: int, prefix: int) -> Tensor:
    """Angles (prefix + n, head): of the row, of the column, and both again, so that `turn` pairs like with like.

    A patch's centre is in [-1, 1] along either axis whatever its length; tokens in front of the patches stay as is.
    """
    periods = ROPE_BASE ** (steps(head // 4) / (head // 4))
    centres = product(*((2 * steps(side) + 1) / side - 1 for side in grid))
    angles = torch.cat([2 * math.pi * centre / periods for centre in centres] * 2, dim=1)
    return torch.cat([angles.new_zeros(prefix, head), angles])


def rope_capi(grid: Grid, head: int, class_tokens: int, registers: int) -> Tensor:
    """Angles (class_tokens + registers + n, head): of the row, twice, then of the column, twice.

    Patches are spread from 0 to 1 along either axis, ends included; registers go round the edge: down
    the first column, along the last row, up the last column and back.
    """
    highest, lowest = CAPI_FREQUENCIES
    quarter = head // 4
    turns = highest * (lowest / highest) ** (steps(quarter) / max(1, quarter - 1))
    rows, columns = product(*(steps(side) / max(1, side - 1) for side in grid))
    way = steps(registers // 4)[:, None] / max(1, registers // 4)
    start, end = torch.zeros_like(way), torch.ones_like(way)
    around = torch.cat([way, end, 1 - way, start]), torch.cat([start, way, end, 1 - way])
    both = [torch.cat([edge * axis.max(), axis]) for edge, axis in zip(around, (rows, columns), strict=True)]
    angles = torch.cat([2 * math.pi * axis * turns for axis in both for _ in range(2)], dim=1)
    return torch.cat([angles.new_zeros(class_tokens, head), angles])


SINCOS = {"sincos2d": sincos2d, "sincos2d_mae": sincos2d_mae, "sincos2d_timm": sincos2d_timm}
