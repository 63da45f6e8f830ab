"""What masked patches are to predict: true colours of uint8 images (ViT paper, appendix B.1.2), pixels, gradients.

Patches come in row-major order; pixels within one in row, column, channel order.
"""

import math

import torch
import torch.nn.functional as F
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


@torch.no_grad()
def hog(
    images: Tensor, patch: int, cell: int = 8, bins: int = 9, window: int | None = None, at: Tensor | None = None
) -> Tensor:
    """Histograms of oriented gradients of each patch: (b, c, h, w) to (b, n, c * bins * cells), float32 at least.

    MaskFeat's (arXiv 2112.09133, section 3.2; HOGLayerC of its authors' operators.py, HOGGenerator of mmpretrain). Each
    channel has gradients of its own, by Sobel's filters, the image reflected at its edge. A pixel adds its gradient's
    length to one of `bins` of equal width, by the angle from the vertical to the horizontal gradient, opposite ones
    alike. Histograms of cells of `cell` pixels a side have length 1; those without any gradient are zero. Numbers of a
    patch are those of its first channel's first bin in each cell, row by row, then of the next bin, as mmpretrain has
    them. A channel's brightness and contrast change nothing: pixels and normalised images give the same.

    window: side of a Gaussian, repeated over the image from its upper left corner, by which lengths are weighed; its
        deviation is half of it. Two cells, mmpretrain's 16 pixels, where not given; 0 for none, as the authors train.
    at: (b, k) of those patches alone, (b, k, c * bins * cells).

    Of whole numbers, gradients and the comparisons by which a bin is found are exact, so that it is the same on every
    device, compiled or not. Raises ValueError for a cell that does not divide the patch, and for other sizes that
    can't be.
    """
    if cell < 1 or patch % cell:
        raise ValueError(f"hog needs a patch that cell ({cell}) divides, got {patch}")
    if bins < 1 or (window is not None and (window < 0 or window == 1)):
        raise ValueError(f"hog needs bins, and a window of 0 or from 2 on, got {bins} and {window}")
    side = patch // cell
    right, down = (_cells(maps, cell, side) for maps in _gradients(images))  # (b, n, c * cells, pixels)
    weights = torch.ones((), device=images.device)
    if window := 2 * cell if window is None else window:
        rows, columns = (_bell(length, window, right) for length in images.shape[-2:])
        maps = (rows.unsqueeze(1) * columns).expand(1, images.shape[1], -1, -1)
        weights = _cells(maps, cell, side)  # (1, n, c * cells, pixels)
    if at is not None:
        index = at[:, :, None, None].expand(-1, -1, *right.shape[2:])
        right, down = right.gather(1, index), down.gather(1, index)
        weights = weights[0][at] if weights.ndim else weights
    length = (right.square() + down.square()).sqrt() * weights
    turned = (right < 0) | ((right == 0) & (down < 0))  # into [0, pi)
    right, down = torch.where(turned, -right, right), torch.where(turned, -down, down)
    bin = torch.zeros_like(right, dtype=torch.int16)
    for edge in (math.pi * number / bins for number in range(1, bins)):
        bin = bin + (right * math.cos(edge) >= down * math.sin(edge))
    sums = torch.stack([(length * (bin == number)).sum(-1) for number in range(bins)], dim=-1)
    sums = F.normalize(sums, dim=-1)  # (b, n, c * cells, bins)
    return rearrange(sums, "b n (c cells) bins -> b n (c bins cells)", cells=side**2)


def _gradients(images: Tensor) -> tuple[Tensor, Tensor]:
    """Sobel's, (b, c, h, w) each, signed as in HOGLayerC: how much brighter it is on the left, and above."""
    if min(images.shape[-2:]) < 2:
        raise ValueError(f"gradients need images of at least 2x2 pixels, got {images.shape[-2]}x{images.shape[-1]}")
    exact = torch.promote_types(images.dtype if images.is_floating_point() else torch.float32, torch.float32)
    image = F.pad(images.to(exact), (1, 1, 1, 1), mode="reflect")
    across = image[..., :-2] - image[..., 2:]
    along = image[:, :, :-2] - image[:, :, 2:]
    return (
        across[:, :, :-2] + 2 * across[:, :, 1:-1] + across[:, :, 2:],
        along[..., :-2] + 2 * along[..., 1:-1] + along[..., 2:],
    )


def _cells(maps: Tensor, cell: int, side: int) -> Tensor:
    """The pixels of each cell of each patch, side x side cells: (b, c, h, w) to (b, n, c * cells, cell * cell)."""
    return rearrange(maps, "b c (h r p) (w s q) -> b (h w) (c r s) (p q)", r=side, s=side, p=cell, q=cell)


def _bell(length: int, window: int, like: Tensor) -> Tensor:
    """A Gaussian of a window's pixels, repeated over a length, as precise as another tensor: its scale is of no
    account."""
    place = (torch.arange(length, device=like.device) % window).to(like.dtype) - (window - 1) / 2
    return (-0.5 * (place / (window // 2)) ** 2).exp()
