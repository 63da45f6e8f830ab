"""The nearest patch that can be seen: what it shows is a guess that needs no learning."""

import math

import torch
from torch import Tensor, nn

from mpp.masks import Grid

LONG = 1024  # patches of an image, from which on a table of all their pairs is not kept
SAMPLE = 64  # patches of such an image for which the nearest is looked for


class Nearest(nn.Module):
    """For hidden patches (b, k) of a grid the nearest that is not; of equally near ones the first in row order.

    Of sequences longer than LONG it gives those of the first SAMPLE patches alone: (b, j).
    """

    order: Tensor  # (n, n), each patch's distances to all; empty for long sequences

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid, self.patches = grid, math.prod(grid)
        table = self._order(torch.arange(self.patches if self.patches <= LONG else 0)).float()
        self.register_buffer("order", table, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        never = torch.zeros(len(hidden), 1, self.patches, device=hidden.device)
        never = never.scatter(2, hidden.unsqueeze(1), torch.inf)
        if self.patches <= LONG:
            return (self.order[hidden] + never).argmin(-1)
        return (self._order(hidden[:, :SAMPLE]) + never).argmin(-1)

    def _order(self, patches: Tensor) -> Tensor:
        """Numbers (..., n) that rise with each patch's distance from the given ones (...), then with its number."""
        everywhere = torch.arange(self.patches, device=patches.device)
        rows = (patches // self.grid[1]).unsqueeze(-1) - everywhere // self.grid[1]
        columns = (patches % self.grid[1]).unsqueeze(-1) - everywhere % self.grid[1]
        return ((rows.square() + columns.square()) * self.patches + everywhere).double()  # exact up to 2 ** 53
