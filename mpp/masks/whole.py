"""Rectangles of patches by whole numbers alone.

Devices, and compiled code, differ in the last bits of `exp` and `sqrt`, and by them a side would be another one now and
then; of float64, where they hardly would, some devices have none. So ratios and areas are multiples of 1 / ONE.
"""

import torch
from torch import Tensor

Grid = tuple[int, int]  # patches, high and wide
ONE_BITS = 24
ONE = 1 << ONE_BITS
BITS = 31  # of the numbers that are drawn
ASPECT_BITS = 8  # 256 ratios are drawn from, at equal distances of their logarithms


def below(numbers: Tensor, limit: Tensor | int) -> Tensor:
    """Whole numbers in [0, limit) of drawn ones."""
    return (numbers * limit) >> BITS


def log_uniform(numbers: Tensor, low: float, high: float) -> Tensor:
    """Ratios in [low, high] of drawn numbers, in units of 1 / ONE, whose logarithms are uniform."""
    steps = numbers >> (BITS - ASPECT_BITS)
    step = (high / low) ** (1 / 2**ASPECT_BITS)
    ratios = torch.full_like(numbers, round(ONE * low * step**0.5))
    for bit in range(ASPECT_BITS):  # step ** steps, by squares
        factor = round(ONE * step ** (1 << bit))
        ratios = torch.where((steps >> bit) & 1 == 1, (ratios * factor) >> ONE_BITS, ratios)
    return ratios


def root(squares: Tensor, most: int, up: bool = False) -> Tensor:
    """Whole square roots, in [1, most], of numbers in units of 1 / ONE: rounded, or rounded up."""
    sides = torch.arange(1, most, device=squares.device)
    passed = (
        (2 * sides) ** 2 if up else (2 * sides + 1) ** 2
    )  # roots above sides, or sides + 1/2, are at least one more
    return 1 + (4 * squares.unsqueeze(-1) > passed * ONE).sum(-1)


def span(first: Tensor, length: Tensor, side: int) -> Tensor:
    """Which of a side's patches are in [first, first + length): (..., side) bool."""
    place, first = torch.arange(side, device=first.device), first.unsqueeze(-1)
    return (place >= first) & (place < first + length.unsqueeze(-1))


def rectangle(top: Tensor, high: Tensor, left: Tensor, wide: Tensor, grid: Grid) -> Tensor:
    """Which patches are in rectangles: (..., n) bool."""
    rows, columns = span(top, high, grid[0]), span(left, wide, grid[1])
    return (rows.unsqueeze(-1) & columns.unsqueeze(-2)).flatten(-2)


def size(grid: Grid) -> str:
    """For messages."""
    return f"{grid[0]} x {grid[1]}"
