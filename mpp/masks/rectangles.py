"""Blocks hidden, or all but one."""

import math

import torch
from torch import Tensor

from mpp import draws
from mpp.masks.tiles import check_random, count_of
from mpp.masks.whole import BITS, Grid, below, log_uniform, root, size, span

SMALLEST = 16 / 196  # the smallest block is 16 of 14 x 14 patches (BEiT, arXiv 2106.08254, algorithm 1)
ASPECT = 0.3  # there: heights are 0.3 to 1 / 0.3 widths
MOST_BLOCKS = 32
VISIBLE_ASPECT = 0.5  # of a visible block (CAPI, arXiv 2502.08769; facebookresearch/capi, data.py)


def blocks(
    images: int, grid: Grid, count: int, device: torch.device, *, smallest: int | None = None, aspect: float = ASPECT
) -> Tensor:
    """Hides blocks, one after the other, until `count` patches are hidden: (b, k) int64.

    BEiT's algorithm 1: a block's area is anything from `smallest` patches (what 16 are to 14 x 14) to as many as are
    still to be hidden, its aspect (height / width) anything from `aspect` to 1 / aspect, uniform in its logarithm as in
    the authors' code, its place anywhere in the grid; blocks overlap. Sides are whole, the width what comes nearest to
    the area, and no side is longer than the grid's.

    The algorithm stops once 40 % are passed; the authors' code tries until a block fits into what is left of 75 of 196,
    and stops short of them where ten did not. Here k is fixed: the last block is cut to what is left, by whole rows or
    columns and a part of one, from a side that is drawn, so that what remains is still a block and no side of pictures
    is preferred. The number of tries is fixed too; where they did not suffice (none of 40,000 images at 75 of 14 x 14,
    one of 1,000 at 147, many at 176), the grid itself is the last block.
    """
    smallest, largest = check_blocks(grid, count, smallest, aspect)
    (height, width), patches = grid, math.prod(grid)
    tries = min(MOST_BLOCKS, math.ceil(8 / (1 - count / patches)))
    numbers = draws.below(draws.keys(images, device), 4 * tries + 1, 1 << BITS)
    ratios = log_uniform(numbers[:, :tries], aspect, 1 / aspect)  # (b, tries)
    hidden = torch.zeros(images, height, width, dtype=torch.bool, device=device)
    before = torch.zeros(images, height, width, dtype=torch.uint8, device=device)  # blocks drawn before it was hidden
    missing = torch.full((images,), count, device=device)
    for number in range(tries):
        areas, tops, lefts = (numbers[:, tries * part + number] for part in (1, 2, 3))  # (b,)
        area = smallest + below(areas, missing.clamp(smallest, largest) - smallest + 1)
        high = torch.maximum(root(area * ratios[:, number], height), (area + width - 1) // width)
        wide = (2 * area + high) // (2 * high)  # rounded
        rows = span(below(tops, height - high + 1), high, height)  # (b, h)
        columns = span(below(lefts, width - wide + 1), wide, width)  # (b, w)
        hidden = hidden | (rows.unsqueeze(2) & columns.unsqueeze(1))
        before = before + ~hidden
        missing = count - hidden.flatten(1).sum(1)
    by_rows = torch.arange(patches, device=device)
    by_columns = by_rows % width * height + by_rows // width
    side = numbers[:, -1:] >> (BITS - 2)  # (b, 1), 0 to 3
    place = torch.where(side < 2, by_rows, by_columns)  # (b, n)
    place = torch.where(side % 2 == 0, place, patches - 1 - place)
    return (before.flatten(1).long() * patches + place).argsort(1)[:, :count]


def check_blocks(grid: Grid, count: int, smallest: int | None = None, aspect: float = ASPECT) -> tuple[int, int]:
    """Areas of the smallest and the largest block; ValueError where blocks don't fit the grid, or the count."""
    _check_aspect(aspect)
    check_random(grid, count)
    smallest = count_of(SMALLEST, math.prod(grid)) if smallest is None else smallest
    largest = min(count, int(min(grid) ** 2 / aspect))
    if not 0 < smallest <= largest:
        raise ValueError(
            f"blocks of at least {smallest} patches with an aspect of {aspect:g} to {1 / aspect:.3g} don't fit a mask "
            f"of {count} patches of a grid of {size(grid)}"
        )
    return smallest, largest


def inverse_block(
    images: int, grid: Grid, count: int, device: torch.device, *, aspect: float = VISIBLE_ASPECT
) -> Tensor:
    """Hides all but one block, which may go on at the opposite border: (b, k) int64, every patch equally likely.

    CAPI's (arXiv 2502.08769, which hides 65 %): the aspect of the visible block (height / width) is drawn as in
    `blocks`, from what fits the grid; its width is rounded up, and it has as many rows as its patches need, the last of
    which may be cut short; then the grid is rolled by any distance in both directions.
    """
    low, high = check_inverse_block(grid, count, aspect)
    (height, width), patches = grid, math.prod(grid)
    visible = patches - count
    numbers = draws.below(draws.keys(images, device), 3, 1 << BITS)
    inverse = log_uniform(numbers[:, :1], 1 / high, 1 / low)  # (b, 1), width / height
    wide = root(visible * inverse, width, up=True).clamp(min=-(-visible // height))
    place = torch.arange(patches, device=device)
    row, column = place // width, place % width
    shown = (column < wide) & (row * wide + column < visible)  # (b, n)
    hidden = (shown * patches + place).argsort(1)[:, :count]
    down, right = below(numbers[:, 1:2], height), below(numbers[:, 2:3], width)
    return (hidden // width + down) % height * width + (hidden % width + right) % width


def check_inverse_block(grid: Grid, count: int, aspect: float = VISIBLE_ASPECT) -> tuple[float, float]:
    """The aspects that fit the grid, lowest and highest; ValueError where none does."""
    _check_aspect(aspect)
    check_random(grid, count)
    visible = math.prod(grid) - count
    low, high = max(aspect, visible / grid[1] ** 2), min(1 / aspect, grid[0] ** 2 / visible)
    if low > high:
        raise ValueError(
            f"a visible block of {visible} patches with an aspect of {aspect:g} to {1 / aspect:.3g} doesn't fit a grid "
            f"of {size(grid)}"
        )
    return low, high


def _check_aspect(aspect: float) -> None:
    if not 0.01 <= aspect <= 1:
        raise ValueError(f"the smallest aspect of a block must be in [0.01, 1], got {aspect:g}")
