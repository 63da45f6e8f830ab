"""Images by number: the bytes of shards, local or fetched, and the pixels that they decode to."""

import os
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import numpy as np

from mpp.decode import DamagedImage, decode_again, decode_first, room
from mpp.errors import UserError, cause
from mpp.files import read_at
from mpp.remote.cache import Cache
from mpp.remote.urls import is_url, shown_url
from mpp.shards.index import Index
from mpp.shards.tar import ShardError

OPEN_SHARDS = 128  # files held open at a time; the usual limit of a process is 1024
AHEAD = 4  # shards that are fetched side by side
PIECE = 2**23  # bytes that are read at once from a disk that does not like to seek
WAITS = (0.1, 1.0, 5.0, None)  # seconds before a failed read is tried again: network file systems fail for moments


class Shards:
    """The tars of an index, read at any place.

    A tar that is gone, cannot be read or has another length than the index says ends reading with one line: what it
    held must not be missing without anybody's knowing.
    """

    def __init__(self, index: Index, cache: Cache | None = None) -> None:
        self.index, self._cache = index, cache
        self._open: dict[int, _File] = {}
        self._coming: dict[int, Future[None]] = {}
        self._lock = threading.Lock()
        self._fetchers = ThreadPoolExecutor(AHEAD if cache else 1, "fetch")

    def read(self, number: int) -> bytes:
        """The encoded image; raises ShardError."""
        index = self.index
        return self.read_at(index.shard.item(number), index.offset.item(number), index.size.item(number))

    def read_at(self, shard: int, offset: int, size: int) -> bytes:
        """The bytes that lie there; raises ShardError."""
        index = self.index
        for wait in WAITS:
            try:
                file = self._file(shard)
                data = file.read(size, offset)
            except FileNotFoundError:
                raise ShardError(f"{shown_url(index.place(shard))}: gone, though the index names it") from None
            except OSError as error:
                if wait is None or isinstance(error, PermissionError):
                    raise ShardError(f"{shown_url(index.place(shard))}: cannot be read: {cause(error)}") from None
                self._close(shard)
                time.sleep(wait)
            else:
                if len(data) != size:
                    self._refuse(shard, file.length)
                return data
        raise AssertionError("the last try raises")

    def ahead(self, shards: Sequence[int]) -> None:
        """Starts to bring these shards near, in this order, and gives up on others that were asked for before."""
        with self._lock:
            for shard in set(self._coming) - set(shards):
                _give_up(self._coming.pop(shard))
                self._open.pop(shard, None)  # an open file takes its space even when the cache has deleted it
            for shard in shards:
                if shard not in self._coming:
                    self._coming[shard] = self._fetchers.submit(self._bring, shard)

    def distrust(self, number: int) -> None:
        """Takes the shard of an image with other bytes out of the cache, so that the next run fetches it anew."""
        shard = self.index.shard.item(number)
        if self._cache and is_url(self.index.shards[shard]):
            self._cache.drop(self.index.place(shard), self.index.shard_bytes[shard])

    def close(self) -> None:
        """Gives up on whatever is being fetched."""
        if self._cache:
            self._cache.close()
        self._fetchers.shutdown(wait=False, cancel_futures=True)

    def _bring(self, shard: int) -> None:
        """Into the cache; a local shard into the memory that the system keeps of files, front to back."""
        with suppress(OSError, UserError):  # met again, and told, by whoever reads it
            file = self._file(shard)
            if not is_url(self.index.shards[shard]):
                for offset in range(0, self.index.shard_bytes[shard], PIECE):
                    file.read(PIECE, offset)
        if shard not in self._coming:  # given up meanwhile
            self._close(shard)

    def _file(self, shard: int) -> "_File":
        if file := self._open.get(shard):
            return file
        file = _File(self._descriptor(shard))  # outside the lock: others read on while this one is fetched
        if file.length != self.index.shard_bytes[shard]:
            self._refuse(shard, file.length)
        with self._lock:
            while len(self._open) >= OPEN_SHARDS:
                self._open.pop(next(iter(self._open)))  # that was opened first; to note which was used last costs more
            return self._open.setdefault(shard, file)

    def _descriptor(self, shard: int) -> int:
        place, size = self.index.place(shard), self.index.shard_bytes[shard]
        if is_url(place):
            assert self._cache, "an index with URLs is opened with a cache"
            return self._cache.open(place, size)
        return os.open(place, os.O_RDONLY)

    def _refuse(self, shard: int, found: int) -> None:
        expected = self.index.shard_bytes[shard]
        raise ShardError(
            f"{shown_url(self.index.place(shard))}: {found} bytes, the index says {expected}; cut or changed?"
        )

    def _close(self, shard: int) -> None:
        with self._lock:
            self._open.pop(shard, None)


def _give_up(coming: Future[None]) -> None:
    """Cancels the fetching of a shard; what failed there for a reason of ours is raised, not lost."""
    if coming.done() and not coming.cancelled():
        coming.result()
    coming.cancel()


class _File:
    """An open file that closes when the last thread that reads it lets go of it."""

    def __init__(self, number: int) -> None:
        self.number = number

    @property
    def length(self) -> int:
        """Bytes of the file as it is now."""
        return os.fstat(self.number).st_size

    def read(self, size: int, offset: int) -> bytes:
        return read_at(self.number, size, offset)  # not mmap: a file cut under a map would kill the process

    def __del__(self) -> None:
        os.close(self.number)


class Indexed:
    """Images by number, each read at its offset and decoded every time."""

    def __init__(self, shards: Shards) -> None:
        self.index, self.shards = shards.index, shards
        self._approved = np.zeros(len(shards.index), bool)  # decoded before, and need no second look

    def __getitem__(self, number: int) -> np.ndarray:
        """The upright pixels (h, w, c) of an image; raises DamagedImage, and ShardError where a whole shard is bad."""
        return self._first(number, self.shards.read(number))

    def each(self, numbers: np.ndarray, ends: np.ndarray) -> Iterator[np.ndarray | DamagedImage]:
        """The pixels of each image in turn, or what is wrong with it.

        Rows from `ends` on may be missing, and the next image may overwrite this one. An image is decoded whole when it
        is met first, so that damage is found then or never: whether it is does not depend on the crop.
        """
        index, known = self.index, self._approved[numbers]
        height = index.height[numbers]
        decoded = height.astype(np.int64) * index.width[numbers] * index.channels  # bytes; true of those that are known
        space = room(int(decoded[known].max(initial=0)))
        places = (column[numbers] for column in (index.shard, index.offset, index.size, index.crc32))
        # Plain lists: taking single elements out of arrays would cost as much as a small image's crop.
        facts = zip(*(column.tolist() for column in (numbers, known, ends, height, *places)), strict=True)
        for number, again, end, tall, shard, offset, size, checksum in facts:
            data = self.shards.read_at(shard, offset, size)
            try:
                if again and zlib.crc32(data) == checksum:
                    pixels = decode_again(data, index.mode, tall, end, space)
                else:
                    pixels = self._first(number, data)
            except DamagedImage as error:
                yield error
            else:
                yield pixels

    def _first(self, number: int, data: bytes) -> np.ndarray:
        """Decodes an image of which nothing is known but what the index says."""
        try:
            pixels, approved = decode_first(data, self.index.mode)
        except DamagedImage:
            self._is_the_one(number, data)
            raise
        if cause := self.wrong(number, data, pixels.shape[:2]):
            raise DamagedImage(cause)
        self._approved[number] = approved
        return pixels

    def wrong(self, number: int, data: bytes, size: tuple[int, ...]) -> str | None:
        """Why a picture (h, w) that decodes well is not the one that the index, and so its label, is of."""
        if not self._is_the_one(number, data):
            return "its bytes are not those that the index was made from (checksum)"
        expected = self.index.height.item(number), self.index.width.item(number)
        if tuple(size) != expected:
            return f"is {size[0]}x{size[1]}, the index says {expected[0]}x{expected[1]}"
        return None

    def _is_the_one(self, number: int, data: bytes) -> bool:
        """Whether these are the bytes that the index was made from."""
        same = zlib.crc32(data) == self.index.crc32.item(number)
        if not same:
            self.shards.distrust(number)
        return same


class Resident(Indexed):
    """As `Indexed`, but each image is decoded once, at its first use, and kept."""

    def __init__(self, shards: Shards) -> None:
        super().__init__(shards)
        self._kept: list[np.ndarray | None] = [None] * len(self.index)

    def __getitem__(self, number: int) -> np.ndarray:
        pixels = self._kept[number]
        if pixels is None:  # two threads may both decode it, to the same pixels
            pixels = self._kept[number] = super().__getitem__(number)
        return pixels

    def each(self, numbers: np.ndarray, ends: np.ndarray) -> Iterator[np.ndarray | DamagedImage]:
        for number in numbers.tolist():
            pixels: np.ndarray | DamagedImage | None = self._kept[number]
            if pixels is None:
                try:
                    pixels = self[number]
                except DamagedImage as error:
                    pixels = error
            yield pixels


def decoded_bytes(index: Index) -> int:
    """Bytes of all images once decoded."""
    return int((index.height.astype(np.int64) * index.width).sum()) * index.channels


def sizes_of(index: Index) -> list[tuple[int, int]]:
    """The different (h, w) of the images whose header is whole."""
    sizes = np.unique(np.stack([index.height, index.width], axis=1)[index.height > 0], axis=0)
    return [(h, w) for h, w in sizes.tolist()]
