"""RandAugment's 15 operations (randaugment.py) for batches, uint8 (b, c, h, w) with 1 or 3 channels, on any device.

They are of three kinds, each done once for all images: most replace values by those of a table, two move values away
from another picture, and five move the picture. What moves differs from randaugment.py by 1 at most, the rest is equal.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mpp.augment.batched_crop import to_uint8
from mpp.augment.config import HIGHEST
from mpp.augment.randaugment import FILL, NAMES

BLENDING = ("ColorIncreasing", "SharpnessIncreasing")
MOVING = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")


def operate(images: Tensor, numbers: Tensor, levels: Tensor) -> Tensor:
    """The images after the operations whose numbers in NAMES and magnitudes are given (b, k); -1 is none."""
    for number, level in zip(numbers.unbind(1), levels.unbind(1), strict=True):
        images = _one(images, number.view(-1, 1, 1, 1), level.view(-1, 1, 1, 1))
    return images


def _one(images: Tensor, number: Tensor, level: Tensor) -> Tensor:
    """One operation on each image; number and level are (b, 1, 1, 1)."""
    index = images.flatten(2).long()  # (b, c, h * w)
    found = _tables(images, index, number[:, 0], level[:, 0]).gather(2, index).view_as(images)
    found = torch.where(_is(number, *BLENDING), _blended(images, number, level), found)
    return torch.where(_is(number, *MOVING), _moved(images, number, level), found)


def _is(number: Tensor, *names: str) -> Tensor:
    """Which images get one of the operations."""
    chosen = number == NAMES.index(names[0])
    for name in names[1:]:
        chosen = chosen | (number == NAMES.index(name))
    return chosen


# Tables of values


def _tables(images: Tensor, index: Tensor, number: Tensor, level: Tensor) -> Tensor:
    """What becomes of each value in each channel, uint8 (b, c, 256); number and level are (b, 1, 1)."""
    values = torch.arange(256, device=images.device)
    counts = torch.zeros(*index.shape[:2], 256, dtype=torch.int32, device=index.device)  # how often each value occurs
    counts = counts.scatter_add(2, index, torch.ones_like(index, dtype=torch.int32))
    share = level.abs() / HIGHEST  # float64, as on the CPU
    bits = (4 - (share * 4).long()).clamp(min=1)
    step = 2 ** (8 - bits)
    threshold = 256 - (share * 256).long()
    tables = {
        "AutoContrast": _auto_contrast(counts, values),
        "Equalize": _equalize(counts, values),
        "Invert": 255 - values,
        "PosterizeIncreasing": values // step * step,
        "SolarizeIncreasing": torch.where(values < threshold, values, 255 - values),
        "SolarizeAdd": torch.where(values < 128, (values + (share * 110).long()).clamp(max=255), values),
        "ContrastIncreasing": _away(values, _mean_grey(images), _factor(level)),
        "BrightnessIncreasing": _away(values, torch.zeros_like(number), _factor(level)),
    }
    chosen = values.expand(*index.shape[:2], 256)
    for name, table in tables.items():
        chosen = torch.where(_is(number, name), table, chosen)
    return chosen.to(torch.uint8)


def _auto_contrast(counts: Tensor, values: Tensor) -> Tensor:
    low = torch.where(counts > 0, values, 255).amin(2, keepdim=True)  # (b, c, 1)
    high = torch.where(counts > 0, values, 0).amax(2, keepdim=True)
    span = (high - low).clamp(min=1).double()
    scale = torch.full_like(span, 255) / span  # torch makes 255 / span a product, which rounds otherwise
    stretched = (values * scale - low * scale).long().clamp(0, 255)
    return torch.where(high > low, stretched, values)


def _equalize(counts: Tensor, values: Tensor) -> Tensor:
    highest = torch.where(counts > 0, values, 0).amax(2, keepdim=True)
    step = (counts.sum(2, keepdim=True) - counts.gather(2, highest)) // 255
    table = (counts.cumsum(2) - counts + step // 2) // step.clamp(min=1)
    return torch.where(step > 0, table.clamp(max=255), values)


def _mean_grey(images: Tensor) -> Tensor:
    """The mean of the grey picture, rounded: int64 (b, 1, 1)."""
    pixels = images.shape[2] * images.shape[3]
    return (2 * _grey(images).sum((2, 3)).unsqueeze(2) + pixels) // (2 * pixels)


# Blends


def _blended(images: Tensor, number: Tensor, level: Tensor) -> Tensor:
    """Moves colours away from grey, or details away from the smoothed picture."""
    other = torch.where(_is(number, "ColorIncreasing"), _grey(images), _smoothed(images).int())
    return _away(images.int(), other, _factor(level))


def _away(values: Tensor, centre: Tensor, factor: Tensor) -> Tensor:
    """Values moved away from others by a factor, in Pillow's float32 and cut down to whole numbers."""
    return to_uint8(centre.float() + factor * (values - centre).float())


def _factor(level: Tensor) -> Tensor:
    return (1 + level / HIGHEST * 0.9).clamp(min=0.1).float()


def _grey(images: Tensor) -> Tensor:
    """Pillow's grey values, int32 (b, 1, h, w)."""
    if images.shape[1] == 1:
        return images.int()
    red, green, blue = images.int().split(1, dim=1)
    return (red * 19595 + green * 38470 + blue * 7471 + 32768) >> 16  # Pillow's Convert.c


def _smoothed(images: Tensor) -> Tensor:
    """Pillow's SMOOTH filter: 5 times a pixel and its 8 neighbours; the outermost pixels stay."""
    if min(images.shape[2:]) < 3:
        return images
    pixels = images.float()
    sums = F.avg_pool2d(pixels, 3, stride=1, divisor_override=1) + 4 * pixels[:, :, 1:-1, 1:-1]
    smooth = images.clone()
    smooth[:, :, 1:-1, 1:-1] = (sums / 13).round().to(torch.uint8)
    return smooth


# Movements


def _moved(images: Tensor, number: Tensor, level: Tensor) -> Tensor:
    """Turns around the centre by up to 30 degrees, shears by up to 0.3 or shifts by up to 0.45 of a side."""
    h, w = images.shape[2:]
    number, share = number.view(-1, 1, 1), level.view(-1, 1, 1) / HIGHEST
    of = {name: torch.where(_is(number, name), share, 0) for name in MOVING}  # (b, 1, 1), 0 for other images
    angle = of["Rotate"] * math.radians(30)
    y = torch.arange(h, device=images.device).view(-1, 1) + 0.5 - h / 2  # from the centre, (h, 1)
    x = torch.arange(w, device=images.device) + 0.5 - w / 2
    # The point of the image that the picture's (x, y) shows: whole numbers are corners of pixels.
    source_x = angle.cos() * x - angle.sin() * y + w / 2 + of["ShearX"] * 0.3 * (y + h / 2)
    source_y = angle.sin() * x + angle.cos() * y + h / 2 + of["ShearY"] * 0.3 * (x + w / 2)
    source_x = (source_x + of["TranslateXRel"] * 0.45 * w).float()  # (b, h, w)
    source_y = (source_y + of["TranslateYRel"] * 0.45 * h).float()
    grid = torch.stack([2 * source_x / w - 1, 2 * source_y / h - 1], dim=3)
    moved = F.grid_sample(images.float(), grid, "bilinear", "border", align_corners=False)
    inside = (source_x >= 0) & (source_x < w) & (source_y >= 0) & (source_y < h)
    return torch.where(inside.unsqueeze(1), to_uint8(moved.round()), FILL).to(torch.uint8)
