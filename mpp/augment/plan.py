"""What becomes of uint8 images: drawn for a whole batch at once, each image's from (seed, position) alone.

In this order: crop, resize and shift; flip; colour jitter; greyscale; blur; solarising; RandAugment; random erasing.
`Plan` says what is done, `apply` does it to one image on the CPU, batched.py to a whole batch on a device.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from mpp.augment.colour import NEUTRAL, Colour, Colours, recolour
from mpp.augment.config import AugmentConfig
from mpp.augment.input import Filter, Input
from mpp.augment.randaugment import Operation, Operations, draw, operate
from mpp.seeds import mix, uniform

TRIES = 10  # of a random box before it is given up, as torchvision's RandomResizedCrop and timm's RandomErasing
ERASED_AREA = (0.02, 1 / 3)  # share of the picture; this and the next as timm's RandomErasing (arXiv 1708.04896)
ERASED_ASPECT = (0.3, 1 / 0.3)
# Erased pixels are normal noise once normalised (timm's mode "pixel"). The reader does not know the encoder's mean and
# std, so it takes those of common photographs, rounded: CIFAR-10 has 0.47 and 0.25, ImageNet 0.45 and 0.23.
NOISE_MEAN, NOISE_STD = 127.5, 63.75
SMALL_PIXELS = 64 * 64  # of pictures that take less time than the call of a function of torch's
ERASING, NOISE, COLOUR = 2, 3, 4  # keep these draws apart from others of (seed, position)


class Erasure(NamedTuple):
    """A rectangle of a picture that becomes noise."""

    box: tuple[int, int, int, int]  # top, left, height, width in pixels
    key: int  # of the noise


class Erasures(NamedTuple):
    """The rectangles of a batch of pictures."""

    boxes: np.ndarray  # (b, 4), of height 0 where nothing is erased
    keys: np.ndarray  # (b,) uint64

    def each(self) -> list[Erasure | None]:
        rows = zip(self.boxes.tolist(), self.keys.tolist(), strict=True)
        return [Erasure(tuple(box), key) if box[2] else None for box, key in rows]


class Change(NamedTuple):
    """What happens to one picture after crop and flip."""

    operations: list[Operation]  # RandAugment's
    erasure: Erasure | None
    colour: Colour | None = None  # comes first


@dataclass(frozen=True)
class Plan:
    """What becomes of each image of a batch; boxes are (top, left, height, width) pixels, int64 (b, 4)."""

    boxes: np.ndarray
    flips: np.ndarray  # (b,) bool
    shifts: np.ndarray  # (b, 2) pixels, down and right
    colours: Colours | None = None
    operations: Operations | None = None
    erasures: Erasures | None = None
    filter: Filter = "bilinear"  # by which boxes are resized

    @property
    def changes(self) -> list[Change] | None:
        """What happens to each picture after crop and flip; None where nothing does to any of them."""
        if self.colours is self.operations is self.erasures is None:
            return None
        operations = self.operations.each() if self.operations else [[] for _ in self.boxes]
        erasures = self.erasures.each() if self.erasures else [None] * len(self.boxes)
        colours = self.colours.each() if self.colours else [None] * len(self.boxes)
        return [Change(*row) for row in zip(operations, erasures, colours, strict=True)]


def training_plan(
    config: AugmentConfig, sizes: np.ndarray, image: tuple[int, int], seed: int, positions: np.ndarray
) -> Plan:
    """Draws the training crops of images of `sizes` (b, 2) at `positions` (b,) of the endless chain of epochs."""
    draws = uniform(3 + 2 + 2 * TRIES, seed, positions)  # (b, ...): flip, shift; place; tries
    still = np.zeros((len(sizes), 2), np.int64)
    flips = (draws[:, 0] < 0.5) & config.flip
    changes = _changes(config, image, seed, positions)
    if config.crop == "inception":
        boxes = _inception(config, sizes, draws[:, 3:5], draws[:, 5:].reshape(-1, TRIES, 2))
        return Plan(boxes, flips, still, *changes)
    shifts = (draws[:, 1:3] * (2 * config.pad + 1)).astype(np.int64) - config.pad
    return Plan(centre(sizes, image, 1.0), flips, shifts if config.crop == "shift" else still, *changes)


def evaluation_plan(input: Input, sizes: np.ndarray) -> Plan:
    """The centre of each image, the same every time."""
    still = np.zeros((len(sizes), 2), np.int64)
    boxes = squeezed(sizes, input.centre) if input.fit == "squeeze" else centre(sizes, input.image, input.centre)
    return Plan(boxes, np.zeros(len(sizes), bool), still, filter=input.filter)


def prepared(pixels: np.ndarray, input: Input) -> np.ndarray:
    """One picture (h, w, c) as evaluation feeds it to an encoder, (h', w', c)."""
    plan = evaluation_plan(input, np.array([pixels.shape[:2]]))
    out = np.empty((*input.image, pixels.shape[2]), np.uint8)
    apply(pixels, plan.boxes[0], False, (0, 0), out, filter=plan.filter)
    return out


def centre(sizes: np.ndarray, image: tuple[int, int], share: float) -> np.ndarray:
    """The largest centred boxes (b, 4) of the aspect of `image`, scaled by `share`."""
    scale = share * (sizes / np.array(image)).min(1, keepdims=True)
    box = np.maximum(np.rint(scale * np.array(image)), 1).astype(np.int64)
    return np.concatenate([(sizes - box) // 2, box], axis=1)


def squeezed(sizes: np.ndarray, share: float) -> np.ndarray:
    """Centred boxes (b, 4) of a share of each side."""
    box = np.maximum(np.rint(share * sizes), 1).astype(np.int64)
    return np.concatenate([(sizes - box) // 2, box], axis=1)


def _inception(config: AugmentConfig, sizes: np.ndarray, place: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """The first of some random boxes that lies within its image, else a centred one of the nearest aspect."""
    box, none = _box(sizes, sizes, config.area, config.aspect, draws)
    if none.any():
        ratio = np.clip(sizes[none, 1] / sizes[none, 0], *config.aspect)
        tall, wide = sizes[none, 0], sizes[none, 1]
        box[none] = np.stack([np.minimum(tall, wide / ratio), np.minimum(wide, tall * ratio)], axis=1).round()
    corner = np.floor(place * (sizes - box + 1))
    return np.concatenate([corner, box], axis=1).astype(np.int64)


def _box(
    sizes: np.ndarray, most: np.ndarray, shares: tuple[float, float], ratios: tuple[float, float], draws: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Height and width (b, 2) of the first of some boxes that is at most so large, and where none is (b,).

    Area (a share of that of `sizes`) and aspect are those of `draws` (b, tries, 2).
    """
    low, high = shares
    area = (low + (high - low) * draws[..., 0]) * sizes.prod(1, keepdims=True)  # (b, tries) pixels
    low, high = np.log(ratios)
    aspect = np.exp(low + (high - low) * draws[..., 1])  # width / height, as often wide as tall
    height, width = np.rint(np.sqrt(area / aspect)), np.rint(np.sqrt(area * aspect))
    fits = (height >= 1) & (width >= 1) & (height <= most[:, :1]) & (width <= most[:, 1:])
    first, rows = fits.argmax(1), np.arange(len(sizes))
    return np.stack([height[rows, first], width[rows, first]], axis=1), ~fits.any(1)


def _changes(
    config: AugmentConfig, image: tuple[int, int], seed: int, positions: np.ndarray
) -> tuple[Colours | None, Operations | None, Erasures | None]:
    """What happens to the pictures after crop and flip; None for what the config does not ask for."""
    coloured = (any(config.jitter) and config.jitter_chance) or config.grey or config.blur or config.solarize
    colours = _colours(config, seed, positions) if coloured else None
    levels = config.randaugment, config.magnitude, config.magnitude_std
    operations = draw(*levels, seed, positions) if config.randaugment else None
    return colours, operations, _erasures(config.erase, image, seed, positions) if config.erase else None


def _colours(config: AugmentConfig, seed: int, positions: np.ndarray) -> Colours:
    """What happens to the colours of each picture."""
    draws = uniform(13, seed, positions, COLOUR)
    whether, sigma, factors, order = draws[:, :4], draws[:, 4], draws[:, 5:9], draws[:, 9:]
    jittered, grey, blurred, solarized = (whether < (config.jitter_chance, config.grey, config.blur, config.solarize)).T
    strengths, neutral = np.array(config.jitter), np.array(NEUTRAL)
    low = np.maximum(neutral - strengths, [0, 0, 0, -0.5])  # no factor below 0, as torchvision's ColorJitter
    jitter = np.where(jittered[:, None], low + (neutral + strengths - low) * factors, neutral)
    jitter = jitter.astype(np.float32).astype(np.float64)  # what float32 holds, so that all devices take the same
    low_sigma, high_sigma = config.blur_sigma
    sigmas = np.where(blurred, low_sigma + (high_sigma - low_sigma) * sigma, 0.0)
    return Colours(jitter, order.argsort(1), grey, sigmas, solarized)


def _erasures(chance: float, image: tuple[int, int], seed: int, positions: np.ndarray) -> Erasures:
    """The rectangles that a share of the pictures lose, none where no try is smaller than the picture."""
    draws = uniform(3 + 2 * TRIES, seed, positions, ERASING)  # (b, ...): whether, place; tries
    sizes = np.tile(image, (len(positions), 1))
    box, none = _box(sizes, sizes - 1, ERASED_AREA, ERASED_ASPECT, draws[:, 3:].reshape(-1, TRIES, 2))
    corner = np.floor(draws[:, 1:3] * (sizes - box + 1))
    erased = (draws[:, 0] < chance) & ~none
    boxes = np.concatenate([corner, box], axis=1).astype(np.int64) * erased[:, None]
    return Erasures(boxes, mix(seed, positions, NOISE))


def apply(
    pixels: np.ndarray,
    box: Sequence[int],
    flip: bool,
    shift: Sequence[int],
    out: np.ndarray,
    change: Change | None = None,
    filter: Filter = "bilinear",
) -> None:
    """Writes the box of `pixels` (h, w, c) into `out` (h', w', c), resized, shifted, flipped and changed."""
    top, left, height, width = box
    cut = pixels[top : top + height, left : left + width]
    down, right = shift
    if down or right:
        pad = max(abs(down), abs(right))
        small = resize(cut, np.empty_like(out), filter)
        framed = cv2.copyMakeBorder(small, pad, pad, pad, pad, cv2.BORDER_REFLECT_101)
        cut = framed.reshape(len(framed), -1, out.shape[2])[pad - down :, pad - right :][: len(out), : out.shape[1]]
    if flip:
        cv2.flip(
            resize(cut, np.empty_like(out), filter), 1, out
        )  # NumPy needs five times as long to mirror a small image
    else:
        resize(cut, out, filter)
    if change is not None:
        if change.colour is not None:
            out[:] = recolour(out, change.colour)
        if change.operations:
            out[:] = operate(out, change.operations)
        if change.erasure is not None:
            _erase(out, change.erasure)


def _erase(out: np.ndarray, erasure: Erasure) -> None:
    """Fills a rectangle of (h, w, c) with noise that depends on the key alone."""
    top, left, height, width = erasure.box
    count = height * width * out.shape[2]
    words = mix(erasure.key, np.arange(-(-count // 4))).view(np.uint16)  # four draws a word
    out[top : top + height, left : left + width] = noise_table()[words[:count]].reshape(height, width, -1)


@functools.cache
def noise_table() -> np.ndarray:
    """Normal noise, rounded and clipped to uint8, by the share of it that is smaller: (65536,)."""
    normal = NormalDist(NOISE_MEAN, NOISE_STD)
    ends = [round(65536 * normal.cdf(value + 0.5)) for value in range(255)]
    return np.repeat(np.arange(256, dtype=np.uint8), np.diff([0, *ends, 65536]))


def resize(pixels: np.ndarray, out: np.ndarray, filter: Filter = "bilinear") -> np.ndarray:
    """Resizes (h, w, c) into `out` by PIL's filter of that name, which antialiases where it shrinks.

    What PIL gives differs by 0.03 grey levels in the mean of photographs, by 0.2 where a small picture is enlarged.
    """
    height, width, _ = out.shape
    tall, wide, _ = pixels.shape
    if tall == height and wide == width:
        out[:] = pixels
    elif filter == "bilinear" and tall <= height and wide <= width and height * width <= SMALL_PIXELS:
        # Enlarging is plain bilinear interpolation; OpenCV's is a seventh of the cost of the call below at 32x32.
        cv2.resize(pixels, (width, height), out)
    else:
        picture = torch.from_numpy(pixels).unsqueeze(0).permute(0, 3, 1, 2)  # so, and only so, torch's fast kernel
        picture = F.interpolate(picture, (height, width), mode=filter, antialias=True)  # leaves (1, c, h, w) as it
        out[:] = picture[0].permute(1, 2, 0).numpy()  # lies in memory, by pixels; else this line costs as much again
    return out
