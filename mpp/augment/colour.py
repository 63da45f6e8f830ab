"""Colour augmentations of uint8 images (h, w, c) with 1 or 3 channels, as torchvision.transforms.v2.functional's.

Each gives torchvision's pixels for the same parameters, but for single values that differ by 1. Brightness, contrast
and solarising are tables of 256 entries; the rest goes through OpenCV, which turns hues in a fifth of torchvision's
time and blurs in a twentieth. The same for whole batches on a device: batched_colour.py.
"""

import math
from typing import NamedTuple

import cv2
import numpy as np

from mpp.augment.randaugment import look_up

# torchvision takes a kernel's size from its user. Beyond 4 standard deviations lies less than 1e-4 of the weight, so
# that any larger kernel (SimCLR and BYOL take 23 pixels for up to 2.0) gives the same pixels but for rounding.
REACH = 4.0  # of the blur's kernel to each side, in standard deviations
SOLARIZE_FROM = 128  # values that are inverted, BYOL's (arXiv 2006.07733, appendix B)
GREY = (0.2989, 0.587, 0.114)  # weights of red, green and blue, torchvision's
VALUES = np.arange(256, dtype=np.uint8)


class Colour(NamedTuple):
    """What happens to the colours of one picture; `Colours` has the same for a batch."""

    jitter: list[float]  # brightness, contrast, saturation, hue; 1, 1, 1, 0 changes nothing
    order: list[int]  # of these four
    grey: bool
    sigma: float  # of the blur in pixels; 0 is none
    solarize: bool


class Colours(NamedTuple):
    """What happens to the colours of a batch of pictures."""

    jitter: np.ndarray  # (b, 4)
    order: np.ndarray  # (b, 4)
    grey: np.ndarray  # (b,)
    sigma: np.ndarray  # (b,)
    solarize: np.ndarray  # (b,)

    def each(self) -> list[Colour]:
        return [Colour(*row) for row in zip(*(column.tolist() for column in self), strict=True)]


def recolour(pixels: np.ndarray, colour: Colour) -> np.ndarray:
    """The image (h, w, c) after jitter, greyscale, blur and solarising, in this order."""
    for number in colour.order:
        if colour.jitter[number] != NEUTRAL[number]:
            pixels = ADJUST[number](pixels, colour.jitter[number])
    if colour.grey:
        pixels = greyscale(pixels)
    if colour.sigma:
        pixels = blur(pixels, colour.sigma)
    return solarize(pixels) if colour.solarize else pixels


def brightness(pixels: np.ndarray, factor: float) -> np.ndarray:
    return look_up(pixels, _whole(VALUES * np.float32(factor)))


def contrast(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Moves values away from the mean of the grey picture."""
    mean = _grey(pixels).mean(dtype=np.float64)
    return look_up(pixels, _whole(VALUES * np.float32(factor) + mean * (1 - factor)))


def saturation(pixels: np.ndarray, factor: float) -> np.ndarray:
    if pixels.shape[2] == 1:
        return pixels
    grey = cv2.cvtColor(_grey(pixels), cv2.COLOR_GRAY2RGB)
    moved = cv2.scaleAdd(grey, 1 - factor, pixels * np.float32(factor))  # rounds once, as torchvision's sum
    return _whole(moved)


def hue(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Turns hues by a share of the circle, in [-0.5, 0.5]."""
    if pixels.shape[2] == 1:
        return pixels
    hsv = cv2.cvtColor(pixels * np.float32(1 / 255), cv2.COLOR_RGB2HSV)  # hues in degrees
    hsv[..., 0] = (hsv[..., 0] + np.float32(360 * factor)) % 360
    # As torchvision goes back to whole numbers: torch.float32 to torch.uint8 with equal shares for 0 and 255.
    return _whole(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB) * np.float32(255.999))


def greyscale(pixels: np.ndarray) -> np.ndarray:
    return pixels if pixels.shape[2] == 1 else cv2.cvtColor(_whole(_grey(pixels)), cv2.COLOR_GRAY2RGB)


def blur(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur over reflected borders."""
    size = [2 * reach(sigma, side) + 1 for side in pixels.shape[:2]]  # odd numbers of pixels
    down, right = (cv2.getGaussianKernel(length, sigma, cv2.CV_32F) for length in size)
    return cv2.sepFilter2D(pixels, -1, right, down, borderType=cv2.BORDER_REFLECT_101).reshape(pixels.shape)


def reach(sigma: float, side: int) -> int:
    """Pixels to each side that the blur of a picture of `side` pixels takes; reflection ends at the other border."""
    return min(math.ceil(REACH * sigma), side - 1)


def solarize(pixels: np.ndarray) -> np.ndarray:
    return look_up(pixels, _whole(np.where(VALUES < SOLARIZE_FROM, VALUES, 255 - VALUES)))


ADJUST = (brightness, contrast, saturation, hue)
NEUTRAL = (1.0, 1.0, 1.0, 0.0)  # what of each changes nothing


def _grey(pixels: np.ndarray) -> np.ndarray:
    """Grey values (h, w) as float32 whole numbers."""
    if pixels.shape[2] == 1:
        return pixels[:, :, 0].astype(np.float32)
    return np.floor(cv2.transform(pixels.astype(np.float32), np.array([GREY], np.float32)))


def _whole(values: np.ndarray) -> np.ndarray:
    """As uint8: clipped and cut down to whole numbers, as torchvision does."""
    return np.clip(values, 0, 255).astype(np.uint8)
