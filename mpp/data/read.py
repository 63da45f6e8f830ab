"""Reading shards: a batch is a pure function of (seed, step), whatever reads it and wherever a run was interrupted."""

import functools
import itertools
import logging
import math
import os
import threading
import zlib
from collections import OrderedDict, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch

from mpp.batch import Batch
from mpp.data.augment import AugmentConfig, Change, Plan, apply, evaluation_plan, training_plan
from mpp.data.decode import DamagedImage, decode
from mpp.data.index import Index, ShardError, read_index
from mpp.data.subset import SubsetConfig
from mpp.errors import cause
from mpp.seeds import permutation

OPEN_SHARDS = 128  # files held open at a time; the usual limit of a process is 1024
GIB = 2**30
# Up to so many pixels decoding takes microseconds, which threads would spend waiting for the interpreter: 32x32 pixels
# are read no faster in two threads than in one (`python -m benchmarks.reading`).
SMALL_PIXELS = 64 * 64

logger = logging.getLogger("mpp.data")


@dataclass(frozen=True)
class DataConfig:
    """Where images come from and how they are read."""

    path: str  # folder of shards
    source: str | None = None  # what `mpp shards make` fills `path` from if it is not there yet
    train: str = "train"  # split
    val: str | None = None  # split that the objective is scored on while training
    subset: SubsetConfig = field(default_factory=SubsetConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    reader: Literal["auto", "resident", "indexed"] = "auto"
    memory: float = 4.0  # GiB of decoded images up to which "auto" keeps them
    threads: int | None = None  # that decode; where not given one a core, or a single one for small images

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("data.path must name a folder, got an empty text")
        if self.memory < 0:
            raise ValueError(f"data.memory must be at least 0 GiB, got {self.memory}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"data.threads must be at least 1, got {self.threads}")


def read_shards(
    path: str | Path,
    batch: int,
    *,
    split: str = "train",
    image: tuple[int, int] | None = None,
    seed: int = 0,
    train: bool = True,
    augment: AugmentConfig | None = None,
    reader: Literal["auto", "resident", "indexed"] = "auto",
    memory: float = 4.0,
    threads: int | None = None,
    numbers: np.ndarray | None = None,
) -> "Batches":
    """Opens a split of a folder of shards for reading in batches.

    image: (h, w) of the pictures; that of the shards' images where all are of one size.
    train: shuffled, augmented and endless; otherwise in order, centred, and each good image once.
    reader: "resident" keeps what it has decoded in memory, "indexed" decodes every time, "auto" is resident for up to
        `memory` GiB. Both give the same batches, bit for bit.
    numbers: of the only images to read, as the index counts them.

    Raises `ShardError`, a ValueError of one line, if the shards are not there, not whole or not as their index says.
    """
    if batch < 1:
        raise ShardError(f"a batch needs at least 1 image, got {batch}")
    index = read_index(Path(path), split)
    if not len(index):
        raise ShardError(f"{path}: split {split} holds no images")
    if numbers is not None:
        index = index.select(numbers)
    if image is None:
        image = _common_size(index)
    if reader == "auto":
        reader = "resident" if _decoded_bytes(index).sum() <= memory * GIB else "indexed"
    images = (Resident if reader == "resident" else Indexed)(index)
    return Batches(images, batch, image, seed, train, augment or AugmentConfig(), threads or _threads_for(index))


def _threads_for(index: Index) -> int:
    """One a core, but a single one for small images."""
    small = np.median(index.height.astype(np.int64) * index.width) <= SMALL_PIXELS
    return 1 if small else os.cpu_count() or 1


def _common_size(index: Index) -> tuple[int, int]:
    """The (h, w) of all images whose header is whole."""
    sizes = np.unique(np.stack([index.height, index.width], axis=1)[index.height > 0], axis=0)
    if len(sizes) != 1:
        found = f"{len(sizes)} sizes" if len(sizes) else "no size that could be read"
        raise ShardError(
            f"{index.folder}: images of split {index.split} have {found}; say which to make of them (image=)"
        )
    return int(sizes[0, 0]), int(sizes[0, 1])


def _decoded_bytes(index: Index) -> np.ndarray:
    """Bytes of each image once decoded."""
    channels = 1 if index.mode == "L" else 3
    return index.height.astype(np.int64) * index.width * channels


class Indexed:
    """Images by number, each read at its offset and decoded every time."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self._open: OrderedDict[int, _File] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, number: int) -> np.ndarray:
        """The upright pixels (h, w, c) of an image; raises DamagedImage."""
        index = self.index
        size, shard, offset = index.size.item(number), index.shard.item(number), index.offset.item(number)
        try:
            data = self._file(shard).read(size, offset)
        except OSError as error:
            raise DamagedImage(f"{index.shards[shard]}: {cause(error)}") from error
        if len(data) != size:
            raise DamagedImage(f"{index.shards[shard]} ends at byte {offset + len(data)}, within the image")
        pixels = decode(data, index.mode)
        if zlib.crc32(data) != index.crc32.item(number):  # a good image, but another than the index's, as is its label
            raise DamagedImage("its bytes are not those that the index was made from (checksum)")
        expected = index.height.item(number), index.width.item(number)
        if pixels.shape[:2] != expected:
            found = f"{pixels.shape[0]}x{pixels.shape[1]}"
            raise DamagedImage(f"is {found}, the index says {expected[0]}x{expected[1]}")
        return pixels

    def _file(self, shard: int) -> "_File":
        with self._lock:
            file = self._open.pop(shard, None)
            if file is None:
                file = _File(self.index.folder / self.index.shards[shard])
                if len(self._open) >= OPEN_SHARDS:
                    self._open.popitem(last=False)
            self._open[shard] = file  # the last is the one used last
            return file


class _File:
    """An open file that closes when the last thread that reads it lets go of it."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def read(self, size: int, offset: int) -> bytes:
        return os.pread(self.number, size, offset)  # not mmap: a file cut under a map would kill the process

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class Resident(Indexed):
    """As `Indexed`, but each image is decoded once, at its first use, and kept."""

    def __init__(self, index: Index) -> None:
        super().__init__(index)
        self._kept: list[np.ndarray | None] = [None] * len(index)

    def __getitem__(self, number: int) -> np.ndarray:
        pixels = self._kept[number]
        if pixels is None:  # two threads may both decode it, to the same pixels
            pixels = self._kept[number] = super().__getitem__(number)
        return pixels


class Batches:
    """The batches of a split. `at(step)` gives any of them; `iterate(start)` gives them in turn, one read ahead.

    In training, position p of the endless chain of epochs holds image permutation(seed, epoch)[p mod n], and batch s
    holds positions s * batch to (s + 1) * batch, across the borders of epochs. The place of an image that turns out
    damaged is taken by the next good one of the epoch. In evaluation damaged images are left out. Either way each is
    named once, in the log and in `damaged`.
    """

    def __init__(
        self,
        images: Indexed,
        batch: int,
        image: tuple[int, int],
        seed: int,
        train: bool,
        augment: AugmentConfig,
        threads: int,
    ) -> None:
        self.index, self.batch, self.image, self.seed, self.train = images.index, batch, image, seed, train
        self.damaged: dict[int, str] = {}  # image number -> cause, of those met so far
        self._images, self._augment, self._threads = images, augment, threads
        self._bad = images.index.damaged.copy()
        self._sizes = np.stack([images.index.height, images.index.width], axis=1).astype(np.int64)
        self._pool = ThreadPoolExecutor(threads, "decode") if threads > 1 else None
        self._permutation = functools.lru_cache(maxsize=2)(lambda epoch: permutation(len(self.index), seed, epoch))
        cv2.setNumThreads(1)  # the threads here are enough; OpenCV's own would fight them and torch's for the cores

    def __len__(self) -> int:
        """Batches an epoch, the last of which may reach into the next one."""
        return math.ceil(len(self.index) / self.batch)

    def at(self, step: int) -> Batch:
        """The batch of a step: uint8 (b, c, h, w) and, if the shards have them, labels (b,)."""
        start = step * self.batch
        if not self.train:
            positions = np.arange(start, min(start + self.batch, len(self.index)))
            return self._read(positions[~self._bad[positions]])
        return self._read(np.arange(start, start + self.batch))

    def iterate(self, start: int = 0) -> Iterator[Batch]:
        """Yields the batches from `start` on, without end in training; the next one is being read meanwhile."""
        steps = itertools.count(start) if self.train else range(start, len(self))
        waiting: deque[Future[Batch]] = deque()
        with ThreadPoolExecutor(1, "read ahead") as ahead:
            for step in steps:
                waiting.append(ahead.submit(self.at, step))
                if len(waiting) == 2:
                    yield waiting.popleft().result()
            for last in waiting:
                yield last.result()

    def _read(self, positions: np.ndarray) -> Batch:
        """Fills a batch, with threads, until each position has a good image or, in evaluation, is left out."""
        channels = 1 if self.index.mode == "L" else 3
        shape = len(positions), *self.image, channels
        # Pinned memory lets the copy to a GPU run beside its computing; torch keeps and reuses such blocks.
        out = torch.empty(shape, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        numbers = self._numbers(positions)
        missing = np.arange(len(positions))
        while len(missing):
            missing = self._fill(out.numpy(), positions, numbers, missing)
            if not self.train and len(missing):
                return self._read(np.delete(positions, missing))
            numbers[missing] = self._numbers(positions[missing])
        labels = torch.from_numpy(self.index.label[numbers].astype(np.int64)) if self.index.classes else None
        return Batch(out.permute(0, 3, 1, 2), labels)

    def _numbers(self, positions: np.ndarray) -> np.ndarray:
        """The images at positions: the first good one from there on in its epoch."""
        if not self.train:
            return positions
        epochs, places = np.divmod(positions, len(self.index))
        numbers = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            numbers[here] = self._permutation(epoch)[places[here]]
        for row in np.flatnonzero(self._bad[numbers]):
            order = np.roll(self._permutation(int(epochs[row])), -places[row])
            good = order[~self._bad[order]]
            if not len(good):
                raise ShardError(f"{self.index.folder}: every image of split {self.index.split} is damaged")
            numbers[row] = good[0]
        return numbers

    def _plan(self, positions: np.ndarray, numbers: np.ndarray) -> Plan:
        sizes = self._sizes[numbers]
        if not self.train:
            return evaluation_plan(self._augment, sizes, self.image)
        return training_plan(self._augment, sizes, self.image, self.seed, positions)

    def _fill(self, out: np.ndarray, positions: np.ndarray, numbers: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Writes the images of some rows of a batch; gives the rows whose image is damaged."""
        plan = self._plan(positions[rows], numbers[rows])
        # Plain lists: taking single elements out of arrays would cost as much as a small image's crop.
        boxes, flips, shifts = plan.boxes.tolist(), plan.flips.tolist(), plan.shifts.tolist()
        changes = plan.changes or [None] * len(rows)
        todo = list(zip(rows.tolist(), numbers[rows].tolist(), boxes, flips, shifts, changes, strict=True))

        def work(part: list[tuple[int, int, list[int], bool, list[int], Change | None]]) -> list[int]:
            damaged = []
            for row, number, box, flip, shift, change in part:
                try:
                    apply(self._images[number], box, flip, shift, out[row], change)
                except DamagedImage as error:
                    damaged.append(row)
                    self._report(number, str(error))
            return damaged

        size = -(-len(todo) // self._threads)
        parts = [todo[start : start + size] for start in range(0, len(todo), size)]
        results = self._pool.map(work, parts) if self._pool else map(work, parts)
        return np.array([row for result in results for row in result], np.int64)

    def _report(self, number: int, cause: str) -> None:
        if number not in self.damaged:
            self.damaged[number] = cause
            self._bad[number] = True
            shard = self.index.folder / self.index.shards[self.index.shard[number]]
            logger.warning("%s: image %s is damaged and passed over: %s", shard, self.index.key(number), cause)
