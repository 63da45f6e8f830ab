"""Crops and flips of uint8 images: drawn for a whole batch at once, each image's from (seed, position) alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from mpp.seeds import uniform

TRIES = 10  # of the inception crop before it gives up, as torchvision's RandomResizedCrop


@dataclass(frozen=True)
class AugmentConfig:
    """How training images become pictures of the encoder's size.

    crop: "inception", a box of random area and aspect (GoogLeNet, arXiv 1409.4842), which the ViT paper pretrains with;
    "shift", a shift by up to `pad` pixels over reflected borders, usual for small images; "none", the centre.
    """

    crop: Literal["inception", "shift", "none"] = "inception"
    area: tuple[float, float] = (0.05, 1.0)  # share of the picture; big_vision's inception_crop
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    pad: int = 4  # pixels
    flip: bool = True  # left to right, every other time
    centre: float = 1.0  # of the shorter side that evaluation sees; 224 / 256 = 0.875 is usual for photographs

    def __post_init__(self) -> None:
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise ValueError(f"data.augment.area must be two rising shares in (0, 1], got {self.area}")
        if not 0 < self.aspect[0] <= self.aspect[1]:
            raise ValueError(f"data.augment.aspect must be two rising ratios above 0, got {self.aspect}")
        if not 0 < self.centre <= 1:
            raise ValueError(f"data.augment.centre must be in (0, 1], got {self.centre}")
        if self.pad < 0:
            raise ValueError(f"data.augment.pad must not be negative, got {self.pad}")


@dataclass(frozen=True)
class Plan:
    """What becomes of each image of a batch; boxes are (top, left, height, width) pixels, int64 (b, 4)."""

    boxes: np.ndarray
    flips: np.ndarray  # (b,) bool
    shifts: np.ndarray  # (b, 2) pixels, down and right


def training_plan(
    config: AugmentConfig, sizes: np.ndarray, image: tuple[int, int], seed: int, positions: np.ndarray
) -> Plan:
    """Draws the training crops of images of `sizes` (b, 2) at `positions` (b,) of the endless chain of epochs."""
    draws = uniform(3 + 2 + 2 * TRIES, seed, positions)  # (b, ...): flip, shift; place; tries
    still = np.zeros((len(sizes), 2), np.int64)
    flips = (draws[:, 0] < 0.5) & config.flip
    if config.crop == "inception":
        return Plan(_inception(config, sizes, draws[:, 3:5], draws[:, 5:].reshape(-1, TRIES, 2)), flips, still)
    shifts = (draws[:, 1:3] * (2 * config.pad + 1)).astype(np.int64) - config.pad
    return Plan(centre(sizes, image, 1.0), flips, shifts if config.crop == "shift" else still)


def evaluation_plan(config: AugmentConfig, sizes: np.ndarray, image: tuple[int, int]) -> Plan:
    """The centre of each image, the same every time."""
    still = np.zeros((len(sizes), 2), np.int64)
    return Plan(centre(sizes, image, config.centre), np.zeros(len(sizes), bool), still)


def centre(sizes: np.ndarray, image: tuple[int, int], share: float) -> np.ndarray:
    """The largest centred boxes (b, 4) of the aspect of `image`, scaled by `share`."""
    scale = share * (sizes / np.array(image)).min(1, keepdims=True)
    box = np.maximum(np.rint(scale * np.array(image)), 1).astype(np.int64)
    return np.concatenate([(sizes - box) // 2, box], axis=1)


def _inception(config: AugmentConfig, sizes: np.ndarray, place: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """The first of some random boxes that lies within its image, else a centred one of the nearest aspect."""
    low, high = config.area
    area = (low + (high - low) * draws[..., 0]) * sizes.prod(1, keepdims=True)  # (b, tries) pixels
    low, high = np.log(config.aspect)
    aspect = np.exp(low + (high - low) * draws[..., 1])  # width / height, as often wide as tall
    height, width = np.rint(np.sqrt(area / aspect)), np.rint(np.sqrt(area * aspect))
    fits = (height >= 1) & (width >= 1) & (height <= sizes[:, :1]) & (width <= sizes[:, 1:])
    first, rows = fits.argmax(1), np.arange(len(sizes))
    box = np.stack([height[rows, first], width[rows, first]], axis=1)
    none = ~fits.any(1)
    if none.any():
        ratio = np.clip(sizes[none, 1] / sizes[none, 0], *config.aspect)
        tall, wide = sizes[none, 0], sizes[none, 1]
        box[none] = np.stack([np.minimum(tall, wide / ratio), np.minimum(wide, tall * ratio)], axis=1).round()
    corner = np.floor(place * (sizes - box + 1))
    return np.concatenate([corner, box], axis=1).astype(np.int64)


def apply(pixels: np.ndarray, box: Sequence[int], flip: bool, shift: Sequence[int], out: np.ndarray) -> None:
    """Writes the box of `pixels` (h, w, c) into `out` (h', w', c), resized, shifted and flipped."""
    top, left, height, width = box
    cut = pixels[top : top + height, left : left + width]
    down, right = shift
    if down or right:
        pad = max(abs(down), abs(right))
        framed = cv2.copyMakeBorder(resize(cut, np.empty_like(out)), pad, pad, pad, pad, cv2.BORDER_REFLECT_101)
        cut = framed.reshape(len(framed), -1, out.shape[2])[pad - down :, pad - right :][: len(out), : out.shape[1]]
    if flip:
        cv2.flip(resize(cut, np.empty_like(out)), 1, out)  # NumPy needs five times as long to mirror a small image
    else:
        resize(cut, out)


def resize(pixels: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Resizes (h, w, c) into `out` by the triangle filter, which antialiases where it shrinks (PIL's BILINEAR)."""
    height, width = out.shape[:2]
    if pixels.shape == out.shape:
        out[:] = pixels
    elif pixels.shape[0] <= height and pixels.shape[1] <= width:
        # Enlarging is plain bilinear interpolation; OpenCV does a small image in a third of the time of the call below.
        cv2.resize(pixels, (width, height), out, interpolation=cv2.INTER_LINEAR)
    else:
        picture = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)
        picture = F.interpolate(picture, (height, width), mode="bilinear", antialias=True)
        out[:] = picture[0].permute(1, 2, 0).numpy()
    return out
