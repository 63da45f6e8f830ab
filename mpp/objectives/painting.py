"""Pictures of what objectives hide."""

import math

import torch
from einops import rearrange
from torch import Tensor

from mpp import targets
from mpp.models.layers import put, take

HATCH = (96, 160)  # the two greys of what is hidden: no grey of a picture's own looks like a checkerboard of them


def hatch(images: Tensor, patch: int) -> Tensor:
    """A checkerboard that stands for hidden patches, its squares a quarter of a patch: pixels of the patches of images
    (b, c, h, w), uint8 (b, n, p * p * c)."""
    side = max(1, patch // 4)  # pixels
    rows, columns = (torch.arange(length, device=images.device) // side for length in images.shape[-2:])
    odd = (rows.unsqueeze(1) + columns) % 2 == 1  # (h, w)
    dark, light = (torch.tensor(grey, dtype=torch.uint8, device=images.device) for grey in HATCH)
    return targets.patch_pixels(torch.where(odd, light, dark).expand_as(images), patch)


def rows(images: Tensor, patch: int, hidden: Tensor, painted: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Pictures of objectives that hide patches (b, k) of images (b, c, h, w).

    seen: the images, hidden patches chequered; truth: what is true of each patch, as pixels (b, n, p * p * c);
    predicted: the same, with what was painted into the hidden patches (b, k, p * p * c).
    """
    seen = put(targets.patch_pixels(images, patch), hidden, take(hatch(images, patch), hidden))
    found = {"seen": seen, "predicted": put(truth, hidden, painted), "truth": truth}
    grid = images.shape[-2] // patch, images.shape[-1] // patch
    return {name: targets.unpatchify(pixels, patch, grid) for name, pixels in found.items()}


def strokes(histograms: Tensor, patch: int) -> Tensor:
    """Histograms of oriented gradients as strokes along the edges, each channel's in its own: (b, n, c, bins, cells) of
    patches, as `targets.hog` has them, to uint8 (b, n, p * p * c). Where strokes cross, the brightest is seen."""
    bins, side = histograms.shape[3], math.isqrt(histograms.shape[4])
    cell = patch // side
    across = torch.arange(cell, device=histograms.device) - (cell - 1) / 2  # pixels from the middle
    angle = (torch.arange(bins, device=histograms.device) + 0.5) * math.pi / bins
    far = torch.outer(angle.cos(), across).unsqueeze(2) + torch.outer(angle.sin(), across).unsqueeze(1)
    lit = (1 - far.abs()).clamp(min=0).to(histograms.dtype)  # (bins, cell, cell)
    light = rearrange(histograms, "b n c bins cells -> b n c cells bins 1 1") * lit
    drawn = light.amax(4)  # (b, n, c, cells, cell, cell)
    pixels = (255 * drawn).clamp(0, 255).round().to(torch.uint8)
    return rearrange(pixels, "b n c (r s) p q -> b n (r p s q c)", r=side)
