"""Pictures of what objectives hide."""

import torch
from torch import Tensor

from mpp import targets

HATCH = (96, 160)  # the two greys of what is hidden: no grey of a picture's own looks like a checkerboard of them


def hatch(images: Tensor, patch: int) -> Tensor:
    """A checkerboard that stands for hidden patches, its squares a quarter of a patch: pixels of the patches of images
    (b, c, h, w), uint8 (b, n, p * p * c)."""
    side = max(1, patch // 4)  # pixels
    rows, columns = (torch.arange(length, device=images.device) // side for length in images.shape[-2:])
    odd = (rows.unsqueeze(1) + columns) % 2 == 1  # (h, w)
    dark, light = (torch.tensor(grey, dtype=torch.uint8, device=images.device) for grey in HATCH)
    return targets.patch_pixels(torch.where(odd, light, dark).expand_as(images), patch)
