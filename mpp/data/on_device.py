"""Batches whose pictures are made on the device that trains: kept or decoded there, cropped and augmented there.

Positions, images and draws are those of `Batches`; pictures differ by rounding alone (docs/data.md).
"""

import threading
from collections.abc import Iterable
from concurrent.futures import Executor
from contextlib import nullcontext
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mpp.augment.batched import augment
from mpp.augment.plan import Plan
from mpp.batch import Batch
from mpp.data.batches import Batches, Reading
from mpp.data.order import Order
from mpp.decode import DamagedImage
from mpp.decode_cuda import decode_on, decoded_to
from mpp.shards.pictures import Indexed, Resident, sizes_of


class Source(Protocol):
    """Images on a device. One batch is brought and then taken, before the next one."""

    def bring(self, numbers: np.ndarray) -> dict[int, str]:
        """Gets images there; for those that are damaged the cause."""

    def take(self, numbers: np.ndarray) -> Tensor | list[Tensor]:
        """Images that were brought: uint8 (b, c, h, w), or a list of (c, h, w) of different sizes."""


class Kept:
    """All images of a split, all of one size, as one tensor; each is decoded once, on the CPU, at its first use."""

    def __init__(self, images: Indexed, device: torch.device, pool: Executor | None) -> None:
        index = images.index
        self._images, self._each = images, pool.map if pool else map
        (size,) = sizes_of(index)
        self._all = torch.empty(len(index), index.channels, *size, dtype=torch.uint8, device=device)
        self._there = np.zeros(len(index), bool)

    def bring(self, numbers: np.ndarray) -> dict[int, str]:
        new = np.unique(numbers[~self._there[numbers]]).tolist()
        found: Iterable[np.ndarray | str] = self._each(self._pixels, new)
        pixels = dict(zip(new, found, strict=True))
        wrong = {number: cause for number, cause in pixels.items() if isinstance(cause, str)}
        good = [number for number in new if number not in wrong]
        if good:
            packed = torch.from_numpy(np.stack([pixels[number] for number in good])).permute(0, 3, 1, 2)
            self._all[torch.tensor(good, device=self._all.device)] = packed.to(self._all.device)
            self._there[good] = True
        return wrong

    def take(self, numbers: np.ndarray) -> Tensor:
        return self._all[torch.from_numpy(numbers).to(self._all.device)]

    def _pixels(self, number: int) -> np.ndarray | str:
        try:
            return self._images[number]
        except DamagedImage as error:
            return str(error)


class Decoded:
    """Images that are decoded on the device each time; threads of the CPU read their bytes."""

    def __init__(self, images: Indexed, device: torch.device, pool: Executor | None) -> None:
        self._images, self._device, self._each = images, device, pool.map if pool else map
        self._now: dict[int, Tensor] = {}

    def bring(self, numbers: np.ndarray) -> dict[int, str]:
        wanted = np.unique(numbers).tolist()
        self._now = {number: self._now[number] for number in wanted if number in self._now}
        new = [number for number in wanted if number not in self._now]
        encoded = list(self._each(self._images.shards.read, new))
        wrong = {}
        mode = self._images.index.mode
        if self._device.type == "cuda":
            images = decode_on(self._device, encoded, mode)
        else:
            images = [decoded_to(self._device, data, mode) for data in encoded]
        for number, data, image in zip(new, encoded, images, strict=True):
            if isinstance(image, DamagedImage):
                wrong[number] = str(image)
            elif cause := self._images.wrong(number, data, image.shape[1:]):
                wrong[number] = cause
            else:
                self._now[number] = image
        return wrong

    def take(self, numbers: np.ndarray) -> list[Tensor]:
        return [self._now[number] for number in numbers.tolist()]


class DeviceBatches(Batches):
    """`Batches` on a device; a resident set lies there, the images of others are decoded there."""

    prepared = "device"

    def __init__(self, images: Indexed, order: Order, reading: Reading, device: torch.device) -> None:
        super().__init__(images, order, reading)
        assert reading.input.filter == "bilinear", "training and its scores resize so"
        self._ahead = 1  # a source brings one batch, then gives it
        self.stored = isinstance(images, Resident) and len(sizes_of(images.index)) == 1
        kind = Kept if self.stored else Decoded
        self._source: Source = kind(Indexed(images.shards), device, self._pool)  # nothing is kept in the host's memory
        self._device = device
        self._lock = threading.Lock()  # what a source has brought is for one batch
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def _read(self, positions: np.ndarray, first: int) -> Batch:
        # In a stream of its own, which the thread that reads ahead waits for: training goes on meanwhile.
        with self._lock, torch.cuda.stream(self._stream) if self._stream else nullcontext():
            batch = self._made(positions, first)
        if self._stream:
            self._stream.synchronize()
            # Its memory must not go to the next batch before training, in another stream, is done with this one.
            for view in batch.all_views:
                view.record_stream(torch.cuda.default_stream(self._device))
        return batch

    def _made(self, positions: np.ndarray, first: int) -> Batch:
        numbers = self._numbers(positions)
        while wrong := self._source.bring(numbers):
            for number, cause in wrong.items():
                self._report(number, cause)
            bad = np.isin(numbers, list(wrong))
            if not self.train:
                return self._made(positions[~bad], first)
            numbers[bad] = self._numbers(positions[bad])
        if not len(numbers):
            shapes = [(0, self.index.channels, *size) for size in self._view_sizes]
            views = [torch.empty(shape, dtype=torch.uint8, device=self._device) for shape in shapes]
            return self._batch(views, numbers, positions)
        images, plans = self._source.take(numbers), self._plans(positions, numbers)
        pairs = zip(plans, self._view_sizes, strict=True)
        made = [self._augmented(images, plan, size) for plan, size in pairs]
        return self._batch(made, numbers, positions - first)

    def _augmented(self, images: Tensor | list[Tensor], plan: Plan, size: tuple[int, int]) -> Tensor:
        compiled = self._stream is not None and not (plan.colours is plan.operations is None)  # hundreds of kernels
        return augment(images, plan, size, compiled=compiled)
