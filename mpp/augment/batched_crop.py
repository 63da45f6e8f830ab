"""Crops of a batch: each side of a picture is a weighted sum of the image's rows or columns.

The weights of an image are two small matrices, so that boxes of any size need one shape and two matrix products.
"""

import torch
from torch import Tensor

# torchvision resizes uint8 images on a CPU by weights of 16 bits, the highest of which is just below 2 ** 15, and of at
# most 22 bits behind the point (ATen's UpSampleKernel.cpp). With the same weights come the same pixels, bit for bit.
HIGHEST_WEIGHT, FINEST = 2**15 - 0.5, 22


def crop(images: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """The boxes (b, 4) of images (b, c, h, w), resized as torchvision's resized_crop(antialias=True) does it.

    As there the picture first gets its width, then its height, with whole numbers in between. The products are sums of
    at most 24 bits, which float32 holds.
    """
    top, left, height, width = boxes.view(-1, 4, 1, 1).unbind(1)  # (b, 1, 1) each
    rows = _triangle(top, height, images.shape[2], size[0])
    columns = _triangle(left, width, images.shape[3], size[1])
    with no_autocast(images):
        wide = (images.float() @ columns.mT.unsqueeze(1) + 0.5).floor()  # (b, c, h, w')
        return to_uint8(rows.unsqueeze(1) @ wide + 0.5)  # (b, c, h', w')


def no_autocast(images: Tensor) -> torch.autocast:
    """For products of pixels: bfloat16 would lose their lower bits. (TF32 is exact enough, to 1/8 of a value.)"""
    return torch.autocast(images.device.type, enabled=False)


def to_uint8(values: Tensor) -> Tensor:
    """Clipped and cut down to whole numbers."""
    return values.clamp(0, 255).to(torch.uint8)


def shift_and_flip(images: Tensor, shifts: Tensor, flips: Tensor) -> Tensor:
    """Shifts images (b, c, h, w) by (b, 2) pixels down and right over reflected borders, then mirrors some (b,)."""
    b, c, h, w = images.shape
    device = images.device
    rows = torch.arange(h, device=device) - shifts[:, :1]  # (b, h)
    columns = torch.arange(w, device=device)
    columns = torch.where(flips[:, None], w - 1 - columns, columns) - shifts[:, 1:]  # (b, w)
    image, channel = torch.arange(b, device=device), torch.arange(c, device=device)
    rows, columns = _reflected(rows, h), _reflected(columns, w)
    return images[image[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None]]


def _triangle(start: Tensor, length: Tensor, side: int, wanted: int) -> Tensor:
    """Weights (b, wanted, side) that resize `length` (b, 1, 1) pixels from `start` on by the triangle filter.

    The filter is as wide as a wanted pixel where it shrinks, which antialiases, and as one of the image's otherwise.
    """
    scale = length.double() / wanted
    centres = scale * (torch.arange(wanted, device=start.device).unsqueeze(1) + 0.5)  # (b, wanted, 1), from `start` on
    places = torch.arange(side, device=start.device) - start  # (b, 1, side)
    distances = (places + 0.5 - centres).abs() / scale.clamp(min=1)
    weights = (1 - distances).clamp(min=0) * ((places >= 0) & (places < length))
    weights = weights / weights.sum(-1, keepdim=True)
    highest = weights.amax((1, 2), keepdim=True)
    step = 2 ** -(HIGHEST_WEIGHT / highest).log2().floor().clamp(max=FINEST)
    return ((weights / step + 0.5).floor() * step).float()


def _reflected(places: Tensor, side: int) -> Tensor:
    """Places beyond a side's ends, back inside as in a mirror that stands on the last pixel."""
    return side - 1 - (side - 1 - places % max(2 * (side - 1), 1)).abs()
