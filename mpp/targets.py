"""What masked patches are to predict, from the true colours of uint8 images (ViT paper, appendix B.1.2).

Patches come in row-major order; pixels within one in row, column, channel order.
"""

import torch
from einops import rearrange
from torch import Tensor

from mpp.errors import counted


def mean_colour(images: Tensor, patch: int, bits: int = 3) -> Tensor:
    """The class of each patch's mean colour: (b, c, h, w) uint8, in colour or grey (c 3 or 1), to (b, n) int64.

    Each channel's mean over the patch, on 0..255, falls in one of 2 ** bits equal bins; the class is
    (red * bins + green) * bins + blue, or the bin of the grey. Sums and bins are whole numbers, so that a mean on an
    edge falls exactly: mean 32.0 is bin 1 of 8.
    """
    return colour_class(cell_sums(images, patch), patch * patch, bits).squeeze(-1)


def colour_grid(images: Tensor, patch: int, grid: int = 4, bits: int = 3) -> Tensor:
    """As `mean_colour` for each cell of the patch downsized to grid x grid: (b, n, grid * grid) int64."""
    if patch % grid:
        raise ValueError(f"colour_grid needs a patch that grid ({grid}) divides, got {patch}")
    return colour_class(cell_sums(images, patch, grid), (patch // grid) ** 2, bits)


def patch_pixels(images: Tensor, patch: int) -> Tensor:
    """The pixels of each patch: (b, c, h, w) to (b, n, patch * patch * c), dtype kept."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch, q=patch)


def unpatchify(pixels: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """The images of which these are the pixels of each patch: (b, n, patch * patch * c) to (b, c, h, w), dtype kept.

    The inverse of `patch_pixels`; grid: (rows, columns) of patches.
    """
    return rearrange(pixels, "b (h w) (p q c) -> b c (h p) (w q)", h=grid[0], w=grid[1], p=patch, q=patch)


def cell_sums(images: Tensor, patch: int, grid: int = 1) -> Tensor:
    """The sums of the colours in each of grid x grid cells of each patch, exact: (b, n, grid * grid, c) int64.

    Images are uint8 in colour or grey, (b, c, h, w) with c 3 or 1; else a ValueError.
    """
    if images.dtype != torch.uint8 or images.shape[1] not in (1, 3):
        found = f"{images.dtype} with {counted(images.shape[1], 'channel')}"
        raise ValueError(f"colour targets need uint8 images with 3 channels, or 1, got {found}")
    side = patch // grid  # pixels; summed in rows and then in columns, several times as fast as both in one
    rows = images.unflatten(3, (-1, side)).sum(4, dtype=torch.int32)
    sums = rows.unflatten(2, (-1, side)).sum(3, dtype=torch.int64)
    return rearrange(sums, "b c (h p) (w q) -> b (h w) (p q) c", p=grid, q=grid)


def colour_class(sums: Tensor, pixels: int, bits: int) -> Tensor:
    """The class of colours given as whole sums (..., c) over `pixels` pixels: (...) int64."""
    bins = (sums << bits) // (256 * pixels)  # floor(mean * 2 ** bits / 256)
    if bins.shape[-1] == 1:
        return bins[..., 0]
    return (bins[..., 0] << 2 * bits) + (bins[..., 1] << bits) + bins[..., 2]


def class_colour(classes: Tensor, bits: int, channels: int = 3) -> Tensor:
    """The colour in the middle of each class's bins: (...) int64 to (..., c) uint8."""
    shifts = [bits * channel for channel in reversed(range(channels))]
    bins = torch.stack([classes >> shift for shift in shifts], dim=-1) & (2**bits - 1)
    width = 256 >> bits
    return (bins * width + width // 2).to(torch.uint8)
