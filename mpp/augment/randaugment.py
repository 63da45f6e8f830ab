"""RandAugment (arXiv 1909.13719) of uint8 images (h, w, c) with 1 or 3 channels, as timm's `rand-m9-mstd0.5-inc1`.

The operations, their magnitudes of 0 to 10 and the even chance of each to be left out are those of
timm/data/auto_augment.py, "increasing" set, with which DeiT, BEiT and MAE are trained or fine-tuned. Maps of values go
through tables of 256 entries, a fifth of the time of Pillow's on small images, and give the same pixels. Pictures are
turned and moved by OpenCV in a third of Pillow's time or less, bilinearly (timm takes bilinear or bicubic, at random
where it is not told); with OpenCV 5 values differ by 1 at most. Posterizing keeps at least one bit: none would leave a
black image, which newer versions of Pillow refuse to make.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageEnhance

from mpp.augment.config import HIGHEST
from mpp.seeds import uniform

Operation = tuple[str, float]  # name; magnitude in [-10, 10], of which operations without a direction take the size

CHANCE = 0.5  # that an operation is done at all
FILL = 128  # where nothing of the picture is
STREAM = 1  # keeps these draws apart from others of (seed, position)
VALUES = np.arange(256)


class Operations(NamedTuple):
    """What is done to a batch of pictures, up to k operations each."""

    numbers: np.ndarray  # (b, k) in NAMES, -1 for one that is left out
    levels: np.ndarray  # (b, k)

    def each(self) -> list[list[Operation]]:
        rows = zip(self.numbers.tolist(), self.levels.tolist(), strict=True)
        return [[(NAMES[number], level) for number, level in zip(*row, strict=True) if number >= 0] for row in rows]


def draw(count: int, magnitude: float, std: float, seed: int, positions: np.ndarray) -> Operations:
    """Draws up to `count` operations, with replacement, for the image at each of the positions (b,)."""
    draws = uniform(count * 5, seed, positions, STREAM).reshape(len(positions), count, 5)
    which, left_out, side, radius, angle = np.moveaxis(draws, -1, 0)  # (b, count) each
    normal = np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * np.pi * angle)  # Box and Muller
    levels = np.clip(magnitude + std * normal, 0, HIGHEST) * np.where(side < 0.5, -1, 1)
    return Operations(np.where(left_out < CHANCE, -1, (which * len(NAMES)).astype(np.int64)), levels)


def operate(pixels: np.ndarray, operations: list[Operation]) -> np.ndarray:
    """The image (h, w, c) after all operations, in their order."""
    for name, level in operations:
        pixels = OPERATIONS[name](pixels, level)
    return pixels


def _auto_contrast(pixels: np.ndarray, level: float) -> np.ndarray:
    """Stretches each channel to the full range."""
    present = _histogram(pixels) > 0  # (c, 256)
    low, high = present.argmax(1, keepdims=True), 255 - present[:, ::-1].argmax(1, keepdims=True)
    scale = 255 / np.maximum(high - low, 1)
    stretched = np.clip((VALUES * scale - low * scale).astype(np.int64), 0, 255)
    return look_up(pixels, np.where(high > low, stretched, VALUES))


def _equalize(pixels: np.ndarray, level: float) -> np.ndarray:
    """Spreads the values of each channel so that all are about equally frequent."""
    counts = _histogram(pixels)  # (c, 256)
    highest = 255 - (counts[:, ::-1] > 0).argmax(1)
    last = np.take_along_axis(counts, highest[:, None], 1)
    step = (counts.sum(1, keepdims=True) - last) // 255
    table = (counts.cumsum(1) - counts + step // 2) // np.maximum(step, 1)
    return look_up(pixels, np.where(step > 0, np.minimum(table, 255), VALUES))


def _invert(pixels: np.ndarray, level: float) -> np.ndarray:
    return 255 - pixels


def _posterize(pixels: np.ndarray, level: float) -> np.ndarray:
    """Keeps the upper 4 bits down to 1, from the lowest to the highest magnitude."""
    bits = max(1, 4 - int(abs(level) / HIGHEST * 4))
    return pixels & np.uint8(256 - 2 ** (8 - bits))


def _solarize(pixels: np.ndarray, level: float) -> np.ndarray:
    """Inverts values from a threshold on, which is the lower the higher the magnitude."""
    threshold = 256 - int(abs(level) / HIGHEST * 256)
    return look_up(pixels, np.where(threshold > VALUES, VALUES, 255 - VALUES))


def _solarize_add(pixels: np.ndarray, level: float) -> np.ndarray:
    """Brightens the lower half of the values by up to 110."""
    brighter = np.minimum(VALUES + int(abs(level) / HIGHEST * 110), 255)
    return look_up(pixels, np.where(VALUES < 128, brighter, VALUES))


def _color(pixels: np.ndarray, level: float) -> np.ndarray:
    enhanced = ImageEnhance.Color(_picture(pixels)).enhance(_factor(level))
    return np.asarray(enhanced).reshape(pixels.shape)


def _contrast(pixels: np.ndarray, level: float) -> np.ndarray:
    grey = int(np.asarray(_picture(pixels).convert("L")).mean() + 0.5)
    return look_up(pixels, _blend(grey, _factor(level)))


def _brightness(pixels: np.ndarray, level: float) -> np.ndarray:
    return look_up(pixels, _blend(0, _factor(level)))


def _sharpness(pixels: np.ndarray, level: float) -> np.ndarray:
    enhanced = ImageEnhance.Sharpness(_picture(pixels)).enhance(_factor(level))
    return np.asarray(enhanced).reshape(pixels.shape)


def _rotate(pixels: np.ndarray, level: float) -> np.ndarray:
    """Turns around the centre by up to 30 degrees."""
    angle = math.radians(level / HIGHEST * 30)
    cos, sin = math.cos(angle), math.sin(angle)
    y, x = pixels.shape[0] / 2, pixels.shape[1] / 2
    return _warp(pixels, ((cos, -sin, x - cos * x + sin * y), (sin, cos, y - sin * x - cos * y)))


def _shear_x(pixels: np.ndarray, level: float) -> np.ndarray:
    return _warp(pixels, ((1, level / HIGHEST * 0.3, 0), (0, 1, 0)))


def _shear_y(pixels: np.ndarray, level: float) -> np.ndarray:
    return _warp(pixels, ((1, 0, 0), (level / HIGHEST * 0.3, 1, 0)))


def _translate_x(pixels: np.ndarray, level: float) -> np.ndarray:
    return _warp(pixels, ((1, 0, level / HIGHEST * 0.45 * pixels.shape[1]), (0, 1, 0)))


def _translate_y(pixels: np.ndarray, level: float) -> np.ndarray:
    return _warp(pixels, ((1, 0, 0), (0, 1, level / HIGHEST * 0.45 * pixels.shape[0])))


OPERATIONS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {  # by timm's names
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
    "Invert": _invert,
    "Rotate": _rotate,
    "PosterizeIncreasing": _posterize,
    "SolarizeIncreasing": _solarize,
    "SolarizeAdd": _solarize_add,
    "ColorIncreasing": _color,
    "ContrastIncreasing": _contrast,
    "BrightnessIncreasing": _brightness,
    "SharpnessIncreasing": _sharpness,
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateXRel": _translate_x,
    "TranslateYRel": _translate_y,
}
NAMES = list(OPERATIONS)


def _factor(level: float) -> float:
    """Of an enhancement: 1 changes nothing, 0.1 takes most away, 1.9 adds as much."""
    return max(0.1, 1 + level / HIGHEST * 0.9)


def _blend(grey: int, factor: float) -> np.ndarray:
    """The table that moves values away from one grey by a factor, in Pillow's float32 and cut down to whole numbers."""
    moved = np.float32(grey) + np.float32(factor) * (VALUES - grey).astype(np.float32)
    return np.clip(moved, 0, 255)


def _histogram(pixels: np.ndarray) -> np.ndarray:
    """How often each channel has each value: (c, 256)."""
    counts = [cv2.calcHist([pixels], [channel], None, [256], [0, 256]).ravel() for channel in range(pixels.shape[2])]
    return np.stack(counts).astype(np.int64)


def look_up(pixels: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Replaces values by those of a table (256,), or (c, 256) with one for each channel."""
    table = np.ascontiguousarray(table.T.astype(np.uint8))
    return cv2.LUT(pixels, table.reshape(1, 256, -1)).reshape(pixels.shape)


def _picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _warp(pixels: np.ndarray, matrix: tuple[tuple[float, ...], tuple[float, ...]]) -> np.ndarray:
    """The picture whose point (x, y) shows the point matrix @ (x, y, 1) of `pixels`; corners are at whole numbers."""
    centred = np.array(matrix, np.float64)
    centred[:, 2] += 0.5 * centred[:, 0] + 0.5 * centred[:, 1] - 0.5  # OpenCV's whole numbers are centres of pixels
    size, inverse = pixels.shape[1::-1], cv2.WARP_INVERSE_MAP
    # OpenCV would blend the picture's edge into the grey; Pillow cuts where the point leaves the picture.
    moved = cv2.warpAffine(pixels, centred, size, flags=cv2.INTER_LINEAR | inverse, borderMode=cv2.BORDER_REPLICATE)
    inside = cv2.warpAffine(np.ones(pixels.shape[:2], np.uint8), centred, size, flags=cv2.INTER_NEAREST | inverse)
    return cv2.copyTo(moved, inside, np.full_like(moved, FILL)).reshape(pixels.shape)
