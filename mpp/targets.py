"""What masked patches are to predict, from the true colours of uint8 images (ViT paper, appendix B.1.2).

Patches come in row-major order; pixels within one in row, column, channel order.
"""

import torch
from einops import rearrange
from torch import Tensor


def mean_colour(images: Tensor, patch: int, bits: int = 3) -> Tensor:
    """The class of each patch's mean colour: (b, 3, h, w) uint8 to (b, n) int64.

    Each channel's mean over the patch, on 0..255, falls in one of 2 ** bits equal bins; the class is
    (red * bins + green) * bins + blue. Sums and bins are whole numbers, so that a mean on an edge falls exactly:
    mean 32.0 is bin 1 of 8.
    """
    return colour_class(_sums(images, patch), patch * patch, bits)


def colour_grid(images: Tensor, patch: int, grid: int = 4, bits: int = 3) -> Tensor:
    """As `mean_colour` for each cell of the patch downsized to grid x grid: (b, n, grid * grid) int64."""
    if patch % grid:
        raise ValueError(f"colour_grid needs a patch that grid ({grid}) divides, got {patch}")
    cell = patch // grid
    cells = colour_class(_sums(images, cell), cell * cell, bits)  # (b, all cells)
    columns = images.shape[-1] // patch
    return rearrange(cells, "b (h p w q) -> b (h w) (p q)", p=grid, w=columns, q=grid)


def patch_pixels(images: Tensor, patch: int) -> Tensor:
    """The pixels of each patch: (b, c, h, w) to (b, n, patch * patch * c), dtype kept."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch, q=patch)


def unpatchify(pixels: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """The images of which these are the pixels of each patch: (b, n, patch * patch * c) to (b, c, h, w), dtype kept.

    The inverse of `patch_pixels`; grid: (rows, columns) of patches.
    """
    return rearrange(pixels, "b (h w) (p q c) -> b c (h p) (w q)", h=grid[0], w=grid[1], p=patch, q=patch)


def colour_class(sums: Tensor, pixels: int, bits: int) -> Tensor:
    """The class of colours given as whole sums (..., 3) over `pixels` pixels: (...) int64."""
    bins = (sums << bits) // (256 * pixels)  # floor(mean * 2 ** bits / 256)
    return (bins[..., 0] << 2 * bits) + (bins[..., 1] << bits) + bins[..., 2]


def class_colour(classes: Tensor, bits: int) -> Tensor:
    """The colour in the middle of each class's bins: (...) int64 to (..., 3) uint8."""
    bins = torch.stack([classes >> 2 * bits, classes >> bits, classes], dim=-1) & (2**bits - 1)
    width = 256 >> bits
    return (bins * width + width // 2).to(torch.uint8)


def _sums(images: Tensor, side: int) -> Tensor:
    """Sums of the colours of squares of side pixels: (b, 3, h, w) uint8 to (b, n, 3) int64, exact."""
    if images.dtype != torch.uint8 or images.shape[1] != 3:
        found = f"{images.dtype} with {images.shape[1]} channels"
        raise ValueError(f"colour targets need uint8 images with 3 channels, got {found}")
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q) c", p=side, q=side).sum(2, dtype=torch.int64)
