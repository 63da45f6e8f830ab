"""A plan carried out for a whole batch at once, as tensor operations on the device where the images lie.

`augment` does to a batch what `mpp.augment.plan.apply` does to one image, and the same plan gives the same pictures but
for rounding (docs/data.md). No step loops over images, waits for the device or has a shape that depends on values, so
that `torch.compile(carry_out)` makes a few kernels of it. Crops: batched_crop.py; jitter, greyscale, blur, solarising:
batched_colour.py; RandAugment: batched_randaugment.py; erasing: batched_erase.py.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as v2

from mpp.augment.batched_colour import blur, greyscale, jitter, solarize
from mpp.augment.batched_crop import crop, shift_and_flip
from mpp.augment.batched_erase import erase
from mpp.augment.batched_randaugment import operate
from mpp.augment.plan import Plan, noise_table


class OnDevice(NamedTuple):
    """The arrays of a `Plan` as tensors on a device, (b, ...) each; None is what the plan does to no image."""

    boxes: Tensor  # (b, 4), these and the others as in Plan, Colours, Operations and Erasures
    flips: Tensor
    shifts: Tensor  # (b, 2)
    jitter: Tensor | None = None  # (b, 4)
    order: Tensor | None = None  # (b, 4)
    grey: Tensor | None = None
    sigma: Tensor | None = None
    solarize: Tensor | None = None
    numbers: Tensor | None = None  # (b, k)
    levels: Tensor | None = None  # (b, k)
    rectangles: Tensor | None = None  # (b, 4)
    keys: Tensor | None = None
    noise: Tensor | None = None  # (65536,), of erased rectangles


def augment(images: Tensor | list[Tensor], plan: Plan, size: tuple[int, int], *, compiled: bool = False) -> Tensor:
    """The pictures, uint8 (b, c, *size), that a plan makes of uint8 images (b, c, h, w), on their device.

    Images of different sizes, as a decoder gives them, come as a list of (c, h, w); they are cropped one by one.
    compiled: in 60 kernels for a plan with everything, which take half a minute to make; otherwise in 460.
    """
    if isinstance(images, list):
        images = torch.stack([_cropped(*both, size) for both in zip(images, plan.boxes.tolist(), strict=True)])
        plan = dataclasses.replace(plan, boxes=np.tile([0, 0, *size], (len(images), 1)))
    return (_compiled() if compiled else carry_out)(images, move(plan, images.device), size)


def move(plan: Plan, device: torch.device) -> OnDevice:
    """A plan on a device, in one transfer that the host does not wait for."""
    given = {"boxes": plan.boxes, "flips": plan.flips, "shifts": plan.shifts}
    if plan.colours:
        given |= plan.colours._asdict()
    if plan.operations:
        given |= plan.operations._asdict()
    if plan.erasures:
        given |= {"rectangles": plan.erasures.boxes, "keys": plan.erasures.keys}
    rows = [_words(array) for array in given.values()]
    packed = torch.from_numpy(np.concatenate(rows, axis=1))  # (b, words) int64
    if device.type == "cuda":
        packed = packed.pin_memory()
    parts = packed.to(device, non_blocking=True).split([row.shape[1] for row in rows], dim=1)
    moved = {name: _as_given(part, given[name]) for name, part in zip(given, parts, strict=True)}
    return OnDevice(**moved, noise=_noise(device) if plan.erasures else None)


def carry_out(images: Tensor, plan: OnDevice, size: tuple[int, int]) -> Tensor:
    """The pictures, uint8 (b, c, *size), of uint8 images (b, c, h, w)."""
    pictures = crop(images, plan.boxes, size)
    pictures = shift_and_flip(pictures, plan.shifts, plan.flips)
    if plan.jitter is not None and plan.order is not None:
        pictures = jitter(pictures, plan.jitter, plan.order)
    if plan.grey is not None:
        pictures = greyscale(pictures, plan.grey)
    if plan.sigma is not None:
        pictures = blur(pictures, plan.sigma)
    if plan.solarize is not None:
        pictures = solarize(pictures, plan.solarize)
    if plan.numbers is not None and plan.levels is not None:
        pictures = operate(pictures, plan.numbers, plan.levels)
    if plan.rectangles is not None and plan.keys is not None and plan.noise is not None:
        pictures = erase(pictures, plan.rectangles, plan.keys, plan.noise)
    return pictures


@functools.cache
def _compiled() -> Callable[[Tensor, OnDevice, tuple[int, int]], Tensor]:
    return torch.compile(carry_out)


def _cropped(image: Tensor, box: list[int], size: tuple[int, int]) -> Tensor:
    return v2.resized_crop(image, *box, size=list(size), antialias=True)


def _words(array: np.ndarray) -> np.ndarray:
    """(b, ...) as int64 (b, words): floats and hashes keep their bits."""
    wide = array.astype(np.int64) if array.dtype == bool else array
    return np.ascontiguousarray(wide).reshape(len(array), -1).view(np.int64)


def _as_given(part: Tensor, array: np.ndarray) -> Tensor:
    """What `_words` made of an array, in its shape and type again; unsigned words stay int64."""
    if array.dtype == bool:
        part = part.bool()
    elif array.dtype == np.float64:
        part = part.view(torch.float64)
    return part.reshape(array.shape)


@functools.cache
def _noise(device: torch.device) -> Tensor:
    return torch.from_numpy(noise_table()).to(device)
