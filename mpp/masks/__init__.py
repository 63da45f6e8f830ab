"""Which patches an objective hides: index tensors (b, k) of fixed k, drawn on the device.

Every draw is of whole numbers by mpp.draws, so that it is the same on any device, compiled or not, and for any part of
a batch; no shape depends on what is drawn, and nothing waits for the device. A grid is patches (high, wide); a patch's
number counts them row by row. What can't be is a ValueError of one line, before anything is drawn.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mpp.masks.context import Blocks, multi_block, target_shapes
from mpp.masks.rectangles import blocks, check_blocks, check_inverse_block, inverse_block
from mpp.masks.tiles import check_random, check_units, count_of, random, random_index, random_order, units
from mpp.masks.whole import Grid

NEARLY = 1e-6  # patches, or units: what floats may have beyond a whole one

__all__ = [
    "MASKS", "Blocks", "Grid", "Mask", "blocks", "count_of", "inverse_block", "multi_block", "random", "random_index",
    "random_order", "target_shapes", "units",
]  # fmt: skip


@dataclass(frozen=True)
class Mask:
    """A way to hide patches, as configs name it: `draw(images, grid, count, device) -> (b, k)`."""

    draw: Callable[[int, Grid, int, torch.device], Tensor]
    check: Callable[[Grid, int], object]  # ValueError where the grid can't have that many patches hidden so
    unit: int = 1  # patches a side that are hidden together; the grid's sides are multiples of it

    def count(self, share: float, grid: Grid, up: bool = False) -> int:
        """How many patches a share of the grid is: rounded, or rounded up; of units always up, as their papers do."""
        if self.unit == 1 and not up:
            return count_of(share, math.prod(grid))
        return math.ceil(share * (math.prod(grid) // self.unit**2) - NEARLY) * self.unit**2


MASKS = {
    "random": Mask(random, check_random),
    "blocks": Mask(blocks, check_blocks),
    "units": Mask(partial(units, unit=2), partial(check_units, unit=2), unit=2),
    "large_units": Mask(partial(units, unit=4), partial(check_units, unit=4), unit=4),
    "inverse_block": Mask(inverse_block, check_inverse_block),
}
