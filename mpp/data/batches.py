"""Batches: position by position, image by image, each a pure function of (seed, step)."""

import itertools
import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from mpp.augment.config import AugmentConfig
from mpp.augment.input import Input
from mpp.augment.plan import Change, Plan, apply, evaluation_plan, training_plan
from mpp.batch import Batch
from mpp.data.config import LastBatch, PrepareName, View, batches_of
from mpp.data.order import Order
from mpp.decode import DamagedImage
from mpp.errors import cause, shown
from mpp.remote.urls import shown_url
from mpp.seeds import seed_of
from mpp.shards.index import ShardError
from mpp.shards.pictures import Indexed

POLL = 0.2  # seconds between two looks whether to stop waiting
PARTS = 4  # of a batch that each thread takes: photographs differ tenfold in cost, and none should wait for the last
TRIED = 8  # batches that a choice by measuring reads, after one that is not counted
VIEWS = 0x7669657773  # "views": what stands in this place of other draws counts from 0 and never comes so far
NAMED = 100  # damaged images that the log names; `mpp shards check` lists them all

Step = tuple[int, list[int], bool, list[int], Change | None]  # row of a batch; box, flip, shift, change of `apply`

logger = logging.getLogger("mpp.data")


class Part(NamedTuple):
    """What one process of several reads."""

    rank: int = 0
    ranks: int = 1

    def of(self, positions: np.ndarray) -> np.ndarray:
        """This rank's part of a batch: consecutive, and as large as any other or smaller by one."""
        start, end = (len(positions) * rank // self.ranks for rank in (self.rank, self.rank + 1))
        return positions[start:end]


class Reading(NamedTuple):
    """How a split is read, nothing left to choose."""

    batch: int  # images of a step, over all ranks
    input: Input  # what the pictures of the first view are for: their size and, in evaluation, what is seen
    seed: int
    train: bool  # shuffled, augmented and endless
    augment: AugmentConfig
    last_batch: LastBatch  # in training
    windowed: bool  # shards are read a window at a time, and brought near before
    threads: int
    part: Part = Part()
    views: tuple[View, ...] = ()  # beside the first


class Batches:
    """The batches of a split. `at(step)` gives any of them; `iterate(start)` gives them in turn, the next being read.

    In training an order (mpp.data.order) says which image each position of an endless chain holds, and batch s holds
    positions s * batch to (s + 1) * batch, across the borders of epochs unless `last_batch` says otherwise. The place
    of an image that turns out damaged is taken by another one of its window. In evaluation damaged images are left out.
    Either way each is named once, in the log and in `damaged`. All views of an image are made of one decoding.
    """

    prepared: PrepareName = "cpu"  # where pictures are made
    stored = False  # on a device, for good

    def __init__(self, images: Indexed, order: Order, reading: Reading) -> None:
        self.index, self.epoch = images.index, order.epoch  # positions that make one epoch
        self.batch, self.input, self.seed, self.train = reading.batch, reading.input, reading.seed, reading.train
        self.image = reading.input.image
        self.damaged: dict[int, str] = {}  # image number -> cause, of those met so far
        self._images, self._order, self._reading = images, order, reading
        self._view_sizes = [self.image, *(view.image for view in reading.views)]
        self._last = reading.last_batch if self.train else "kept"
        self._bad = images.index.damaged.copy()
        self._sizes = np.stack([images.index.height, images.index.width], axis=1).astype(np.int64)
        self._pool = ThreadPoolExecutor(reading.threads, "decode") if reading.threads > 1 else None
        # Two batches in the making, so that no thread idles at the end of one; windows are brought near one by one.
        self._ahead = 2 if self._pool and not reading.windowed else 1
        if not len(self):
            raise ShardError(f"{self.index.origin}: {self.epoch} images make no batch of {self.batch} to keep")
        cv2.setNumThreads(1)  # the threads here are enough; OpenCV's own would fight them and torch's for the cores

    @property
    def part(self) -> Part:
        """What of each batch this process reads."""
        return self._reading.part

    def __repr__(self) -> str:
        kind = "training" if self.train else "evaluation"
        size = "x".join(map(str, self.image))
        return (
            f"<{type(self).__name__} for {kind}: {len(self)} an epoch, each {self.batch} images of {size}; "
            f"{self.epoch} images of split {self.index.split} of {self.index.origin}>"
        )

    def __iter__(self) -> Iterator[Batch]:
        """One epoch, from its start; `iterate` goes on without end in training."""
        return itertools.islice(self.iterate(), len(self))

    def __len__(self) -> int:
        """Batches an epoch; a chained one's last may reach into the next epoch."""
        return batches_of(self.epoch, self.batch, self._last)

    def at(self, step: int) -> Batch:
        """The batch of a step, or this rank's part: uint8 (b, c, h, w) and, if the shards have them, labels (b,).

        Steps go on without end in training. Raises IndexError for one that there is not.
        """
        if step < 0 or (not self.train and step >= len(self)):
            steps = "without end" if self.train else f"to {len(self) - 1}"
            raise IndexError(f"no batch {step}: steps go from 0 {steps}")
        whole = self._positions(step)
        if self._reading.windowed and len(whole):
            self._images.shards.ahead(self._order.shards(int(whole[0]), int(whole[-1])))
        positions = self._reading.part.of(whole)
        return self._read(positions if self.train else positions[~self._bad[positions]], int(whole[0]))

    def _positions(self, step: int) -> np.ndarray:
        """Of the whole batch."""
        if self._last == "chained":
            return np.arange(step * self.batch, (step + 1) * self.batch)
        epoch, place = divmod(step, len(self)) if self.train else (0, step)
        start = place * self.batch
        return epoch * self.epoch + np.arange(start, min(start + self.batch, self.epoch))

    def iterate(self, start: int = 0, stop: Sequence[int] = ()) -> Iterator[Batch]:
        """Yields the batches from `start` on, without end in training; the next one is being read meanwhile.

        Ends early, instead of waiting for a batch, once `stop` holds something, such as a signal.
        """
        steps = itertools.count(start) if self.train else range(start, len(self))
        waiting: deque[Future[Batch]] = deque()
        ahead = ThreadPoolExecutor(self._ahead, "read ahead")
        try:
            for step in steps:
                waiting.append(ahead.submit(self.at, step))
                if len(waiting) > self._ahead and not self._is_there(waiting[0], stop):
                    return
                if len(waiting) > self._ahead:
                    yield waiting.popleft().result()
            for last in waiting:
                if not self._is_there(last, stop):
                    return
                yield last.result()
        finally:
            ahead.shutdown(wait=False, cancel_futures=True)  # what it still fetches may take long to fail

    def _is_there(self, batch: Future[Batch], stop: Sequence[int]) -> bool:
        """Waits for a batch; False if it is given up."""
        while not wait([batch], POLL).done:
            if stop:
                self.close()
                return False
        return True

    def _read(self, positions: np.ndarray, first: int) -> Batch:
        """Fills a batch, with threads, until each position has a good image or, in evaluation, is left out.

        first: the position at which the whole batch begins.
        """
        shapes = [(len(positions), *size, self.index.channels) for size in self._view_sizes]
        # Pinned memory lets the copy to a GPU run beside its computing; torch keeps and reuses such blocks.
        pinned = torch.cuda.is_available()
        views = [torch.empty(shape, dtype=torch.uint8, pin_memory=pinned) for shape in shapes]
        numbers = self._numbers(positions)
        missing = np.arange(len(positions))
        while len(missing):
            missing = self._fill([view.numpy() for view in views], positions, numbers, missing)
            if not self.train and len(missing):
                good = np.setdiff1d(np.arange(len(positions)), missing)
                views = [view[torch.from_numpy(good)] for view in views]
                numbers, positions = numbers[good], positions[good]
                break
            numbers[missing] = self._numbers(positions[missing])
        return self._batch([view.permute(0, 3, 1, 2) for view in views], numbers, positions - first)

    def _batch(self, views: Sequence[Tensor], numbers: np.ndarray, places: np.ndarray) -> Batch:
        """All views of some images, their labels, and their places in the whole batch."""
        return Batch(views[0], self._labels(numbers), tuple(views[1:]), places)

    def _labels(self, numbers: np.ndarray) -> Tensor | None:
        return torch.from_numpy(self.index.label[numbers].astype(np.int64)) if self.index.classes else None

    def _numbers(self, positions: np.ndarray) -> np.ndarray:
        """The images at positions, the good ones of the bad."""
        numbers = self._order.at(positions)
        for row in np.flatnonzero(self._bad[numbers]) if self.train else ():
            good = self._order.instead(int(positions[row]), self._bad)
            if good is None:
                key = shown(self.index.key(int(numbers[row])))
                raise ShardError(f"{self.index.origin}: {key} and every image that could take its place is damaged")
            numbers[row] = good
        return numbers

    def _plans(self, positions: np.ndarray, numbers: np.ndarray) -> list[Plan]:
        """Of each view: the first is drawn from (seed, position), view v = 1, 2, ... from (seed, v, position).

        In evaluation the first is the centre, and the others are drawn as in training.
        """
        sizes, reading = self._sizes[numbers], self._reading
        if self.train:
            first = training_plan(reading.augment, sizes, self.image, self.seed, positions)
        else:
            first = evaluation_plan(reading.input, sizes)
        return [first] + [
            training_plan(view.augment, sizes, view.image, seed_of(self.seed, VIEWS, number), positions)
            for number, view in enumerate(reading.views, 1)
        ]

    def _fill(
        self, views: Sequence[np.ndarray], positions: np.ndarray, numbers: np.ndarray, rows: np.ndarray
    ) -> np.ndarray:
        """Writes the images of some rows of a batch in all views; gives the rows whose image is damaged."""
        plans = self._plans(positions[rows], numbers[rows])
        ends = np.max([plan.boxes[:, 0] + plan.boxes[:, 2] for plan in plans], axis=0)  # of the rows that crops need
        first, *others = views
        filter = plans[0].filter
        todo, *further = [_steps(plan, rows) for plan in plans]

        def work(part: slice) -> list[int]:
            damaged = []
            images = self._images.each(numbers[rows[part]], ends[part])
            for pictures, steps in zip(others, further, strict=True):
                images = _also_made(images, steps[part], pictures)
            for pixels, (row, box, flip, shift, change) in zip(images, todo[part], strict=True):
                if isinstance(pixels, DamagedImage):
                    damaged.append(row)
                    self._report(int(numbers[row]), str(pixels))
                else:
                    apply(pixels, box, flip, shift, first[row], change, filter)
            return damaged

        size = -(-len(todo) // (self._reading.threads * PARTS if self._pool else 1))
        parts = [slice(start, start + size) for start in range(0, len(todo), size)]
        results = self._pool.map(work, parts) if self._pool else map(work, parts)
        return np.array([row for result in results for row in result], np.int64)

    def _report(self, number: int, why: str) -> None:
        if number in self.damaged:
            return
        self.damaged[number] = why
        self._bad[number] = True
        if len(self.damaged) <= NAMED:
            shard, key = shown_url(self.index.place(self.index.shard[number])), shown(self.index.key(number))
            logger.warning("%s: image %s is damaged and passed over: %s", shard, key, why)
        if len(self.damaged) == NAMED:
            logger.warning("%s: further damaged images are passed over unnamed", self.index.origin)

    def close(self) -> None:
        """Gives up on whatever is still being read or fetched."""
        self._images.shards.close()


def faster(safe: Batches, other: Batches) -> Batches:
    """Whichever reads a few batches in less time; the first if the other one fails, as on a device without memory."""
    try:
        chosen, left = (safe, other) if _seconds(safe) <= _seconds(other) else (other, safe)
    except RuntimeError as error:  # of torch, whatever it is
        logger.warning("pictures are made on the CPU, since the device fails: %s", cause(error))
        chosen, left = safe, other
    left.close()
    return chosen


def _seconds(batches: Batches) -> float:
    batches.at(0)
    start = time.perf_counter()
    for step in range(1, TRIED + 1):
        batches.at(step)
    return time.perf_counter() - start


def _steps(plan: Plan, rows: np.ndarray) -> list[Step]:
    """What `apply` does to each image, as plain values: single elements of arrays cost as much as a small crop."""
    changes: Sequence[Change | None] = plan.changes or [None] * len(rows)
    columns = rows.tolist(), plan.boxes.tolist(), plan.flips.tolist(), plan.shifts.tolist(), changes
    return list(zip(*columns, strict=True))


def _also_made(
    images: Iterator[np.ndarray | DamagedImage], steps: list[Step], pictures: np.ndarray
) -> Iterator[np.ndarray | DamagedImage]:
    """Passes images on once a further view of each is made: while its pixels are there, and at no cost to one view."""
    for pixels, (row, box, flip, shift, change) in zip(images, steps, strict=True):
        if not isinstance(pixels, DamagedImage):
            apply(pixels, box, flip, shift, pictures[row], change)
        yield pixels
