"""Patches hidden one by one, or in squares that tile the grid."""

import math

import torch
from torch import Tensor

from mpp import draws
from mpp.masks.whole import Grid, size


def count_of(share: float, patches: int) -> int:
    """How many patches a share is: rounded, but at least one."""
    return max(1, round(share * patches))


def random_index(images: int, patches: int, count: int, device: torch.device) -> Tensor:
    """Draws `count` different patches of each image, every set equally likely: (b, k) int64."""
    return random_order(images, patches, device)[:, :count]


def random_order(images: int, patches: int, device: torch.device) -> Tensor:
    """Draws an order of each image's patches, every one equally likely: (b, n) int64."""
    return draws.words(draws.keys(images, device), patches).argsort(1)  # words of 64 bits: none is there twice


def random(images: int, grid: Grid, count: int, device: torch.device) -> Tensor:
    """Hides `count` patches of each image, every set equally likely, as MAE does (arXiv 2111.06377): (b, k) int64."""
    check_random(grid, count)
    return random_index(images, math.prod(grid), count, device)


def check_random(grid: Grid, count: int) -> None:
    """ValueError for a mask that leaves nothing visible, or nothing to predict, whatever its shape."""
    if not 0 < count < math.prod(grid):
        what = "nothing to predict" if count <= 0 else "nothing visible"
        raise ValueError(f"a mask of {count} patches leaves {what} of a grid of {size(grid)}")


def units(images: int, grid: Grid, count: int, device: torch.device, *, unit: int = 2) -> Tensor:
    """Hides squares of unit x unit patches that tile the grid, every set equally likely: (b, k) int64.

    SimMIM (arXiv 2111.09886) hides units of 32 pixels, 2 x 2 patches of 16, and 0.6 of them; Pixio (arXiv 2512.15715)
    4 x 4 patches, and 0.75. `count` is of patches: that of whole units, to which both round a share up.
    """
    check_units(grid, count, unit)
    wide = grid[1] // unit
    chosen = random_index(images, math.prod(grid) // unit**2, count // unit**2, device).unsqueeze(2)  # (b, units, 1)
    first = (chosen // wide * grid[1] + chosen % wide) * unit
    inside = torch.arange(unit**2, device=device)
    return (first + inside // unit * grid[1] + inside % unit).flatten(1)  # (b, units, unit * unit) -> (b, k)


def check_units(grid: Grid, count: int, unit: int = 2) -> None:
    """ValueError for units that don't tile the grid, or a count that is not one of whole units."""
    if unit < 1 or grid[0] % unit or grid[1] % unit:
        raise ValueError(f"units of {unit} x {unit} patches don't tile a grid of {size(grid)}")
    check_random(grid, count)
    if count % unit**2:
        raise ValueError(f"a mask of {count} patches is not one of whole units of {unit} x {unit}")
