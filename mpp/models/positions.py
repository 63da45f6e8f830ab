"""Positions: what is added to patch tokens so that the encoder can tell them apart."""

import functools

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Grid = tuple[int, int]  # patches, (rows, columns)


class Learned(nn.Module):
    """A learned vector for each patch, and for the class token one of its own (ViT paper, appendix D.4, "1-D").

    For another grid the patches' part is interpolated: "bilinear" with corners aligned as in the paper's code,
    "bicubic" with pixel centres aligned as in MAE's.
    """

    def __init__(self, grid: Grid, width: int, prefix: int, resize: str) -> None:
        super().__init__()
        self.grid, self.prefix, self.resize = grid, prefix, resize
        self.table = nn.Parameter(torch.empty(prefix + grid[0] * grid[1], width))

    def patches(self, grid: Grid) -> Tensor:
        """Positions (n, d) of the patches of a grid."""
        table = self.table[self.prefix :]
        if grid == self.grid:
            return table
        picture = rearrange(table, "(h w) d -> 1 d h w", h=self.grid[0]).float()
        picture = F.interpolate(picture, grid, mode=self.resize, align_corners=self.resize == "bilinear")
        return rearrange(picture, "1 d h w -> (h w) d").to(table.dtype)

    def prefixes(self) -> Tensor:
        """Positions (prefix, d) of the tokens in front of the patches."""
        return self.table[: self.prefix]


class SinCos2d(nn.Module):
    """Fixed 2-D sine-cosine positions in big_vision's layout (sin x, cos x, sin y, cos y); none for prefixes."""

    zero: Tensor

    def __init__(self, grid: Grid, width: int, prefix: int, resize: str) -> None:
        super().__init__()
        if width % 4:
            raise ValueError(f"positions sincos2d need a width that 4 divides, got {width}")
        self.width = width
        self.register_buffer("zero", torch.zeros(1, width), persistent=False)

    def patches(self, grid: Grid) -> Tensor:
        return sincos2d(grid, self.width).to(self.zero.device)

    def prefixes(self) -> Tensor:
        return self.zero


@functools.lru_cache(maxsize=8)
def sincos2d(grid: Grid, width: int) -> Tensor:
    """Positions (n, width), float32: frequencies 10,000 ** -(k / (width / 4 - 1)), as in big_vision's models/vit.py."""
    rows, columns = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    omega = 10_000.0 ** -torch.linspace(0, 1, width // 4, dtype=torch.float64)
    x, y = columns.reshape(-1, 1) * omega, rows.reshape(-1, 1) * omega  # (n, width / 4)
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1).float()


class NoPositions(nn.Module):
    """No positions: the encoder sees a bag of patches (the paper's ablation, table 8)."""

    zero: Tensor

    def __init__(self, grid: Grid, width: int, prefix: int, resize: str) -> None:
        super().__init__()
        self.register_buffer("zero", torch.zeros(1, width), persistent=False)

    def patches(self, grid: Grid) -> Tensor:
        return self.zero

    def prefixes(self) -> Tensor:
        return self.zero


POSITIONS: dict[str, type[Learned] | type[SinCos2d] | type[NoPositions]] = {
    "learned": Learned,
    "sincos2d": SinCos2d,
    "none": NoPositions,
}
