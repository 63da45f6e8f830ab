"""Shards by URL: a folder of fetched tars, bounded in bytes, that threads and processes share."""

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event
from typing import IO
from weakref import WeakSet

from mpp.errors import cause
from mpp.files import is_at
from mpp.remote.fetch import RETRY, Retry, fetch
from mpp.remote.urls import RemoteError, check_url, shown_url

SHARD = ".mpp-shard"  # a whole one; only files of these two endings are ever deleted
PART = ".mpp-part"  # one that is being fetched by whoever holds a lock on it
POLL = 0.05  # seconds between two looks whether another one is done
FULL = (errno.ENOSPC, errno.EDQUOT)


_caches: "WeakSet[Cache]" = WeakSet()


def close_caches() -> None:
    """Ends all fetching of this process soon; Python would wait for it before it exits."""
    for cache in list(_caches):
        cache.close()


class Cache:
    """Fetched shards in a folder, of which those that were opened longest ago give way to new ones.

    A shard is known by its URL and size. As long as it is fetched its part file is locked (flock) and has the full
    length, so that others, in this process or another one, wait for it and count it. A part without a lock is one of a
    process that was killed.
    """

    def __init__(
        self,
        folder: str | Path,
        limit: int,
        *,
        allow: Collection[str] = (),
        retry: Retry = RETRY,
    ) -> None:
        """limit: bytes of all files together. allow: see check_url."""
        self.folder, self.limit, self.allow, self.retry = Path(folder), limit, tuple(allow), retry
        self._stop = Event()
        _caches.add(self)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RemoteError(f"{self.folder}: cannot be made: {cause(error)}") from None
        self._remove_left_over(self._files(PART))

    def open(self, url: str, size: int) -> int:
        """A descriptor of the whole shard, open for reading; fetches it where it is not there. Raises RemoteError.

        It stays readable when the shard is deleted, but takes space until it is closed.
        """
        check_url(url, self.allow)
        if size > self.limit:
            raise RemoteError(f"{shown_url(url)}: {size} bytes, more than the {self.limit} that {self.folder} may hold")
        shard = self._place(url, size)
        part = shard.with_suffix(PART)
        try:
            while True:
                if (descriptor := _opened(shard, size)) is not None:
                    return descriptor
                with self._claimed(part, shard) as file:
                    if file:
                        self._fetch(url, file, size)
                        descriptor = os.open(part, os.O_RDONLY)  # before others can delete it
                        os.replace(part, shard)
                        return descriptor
        except OSError as error:
            raise RemoteError(f"{self.folder}: cannot hold {shown_url(url)}: {cause(error)}") from None

    def drop(self, url: str, size: int) -> None:
        """Deletes a shard that is not what it should be; whoever opens it next fetches it again."""
        with suppress(OSError):
            self._place(url, size).unlink()

    def _place(self, url: str, size: int) -> Path:
        name = hashlib.sha256(f"{url}\0{size}".encode("utf-8", "surrogateescape")).hexdigest()[:32]
        return self.folder / (name + SHARD)

    def close(self) -> None:
        """Ends all fetching and waiting soon, with RemoteError in those who wait."""
        self._stop.set()

    def _pause(self) -> None:
        if self._stop.wait(POLL):
            raise RemoteError(f"{self.folder}: given up, since reading has ended")

    @contextmanager
    def _claimed(self, part: Path, shard: Path) -> Iterator[IO[bytes] | None]:
        """The part file, locked; None if somebody else has fetched the shard meanwhile. Deleted unless renamed."""
        with open(os.open(part, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0) as file:
            while not _lock(file):
                self._pause()
            if shard.exists() or not is_at(file, part):
                if is_at(file, part):
                    part.unlink()
                yield None
                return
            try:
                yield file
            finally:
                if is_at(file, part):
                    part.unlink()

    def _fetch(self, url: str, file: IO[bytes], size: int) -> None:
        while True:
            self._reserve(file, size)
            try:
                fetch(url, file, size, self.retry, allow=self.allow, stop=self._stop)
                os.fsync(file.fileno())
                return
            except OSError as error:
                if error.errno not in FULL:
                    raise
                os.ftruncate(file.fileno(), 0)
                if not self._free(size):
                    free = shutil.disk_usage(self.folder).free
                    raise RemoteError(
                        f"{self.folder}: the disk is full: {free} bytes are free, {shown_url(url)} needs {size}"
                    ) from None

    def _reserve(self, file: IO[bytes], size: int) -> None:
        """Gives the file its length, once all files together fit the limit; what others are fetching is waited for."""
        while True:
            with self._folder_lock():
                os.ftruncate(file.fileno(), 0)
                self._remove_left_over(self._files(PART))
                used = sum(self._files(PART).values())  # first, so that none escapes that is renamed meanwhile
                used += sum(self._files(SHARD).values())
                used -= self._delete_oldest(used + size - self.limit)
                if used + size <= self.limit:
                    os.ftruncate(file.fileno(), size)  # takes no space yet, but is counted by others
                    return
            self._pause()

    def _free(self, size: int) -> int:
        """Deletes shards of so many bytes together, or all; returns their bytes."""
        with self._folder_lock():
            return self._delete_oldest(size)

    def _delete_oldest(self, need: int) -> int:
        """Deletes shards until so many bytes are free; returns how many are."""
        freed = 0
        for path, bytes_ in self._files(SHARD).items():
            if freed >= need:
                break
            path.unlink(missing_ok=True)
            freed += bytes_
        return freed

    def _files(self, ending: str) -> dict[Path, int]:
        """Our files of an ending and their bytes, the one opened longest ago first."""
        found = []
        for path in self.folder.glob("*" + ending):
            with suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime_ns, path, status.st_size))
        return {path: size for _, path, size in sorted(found)}

    def _remove_left_over(self, parts: Collection[Path]) -> None:
        for part in parts:
            with suppress(FileNotFoundError), open(part, "r+b") as file:
                if _lock(file) and is_at(file, part):
                    part.unlink()

    @contextmanager
    def _folder_lock(self) -> Iterator[None]:
        with open(self.folder / ".lock", "ab") as file:
            while not _lock(file):
                self._pause()
            yield


def _lock(file: IO[bytes]) -> bool:
    """Whether the lock of an open file was got; closing the file, or the end of the process, gives it back."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _opened(shard: Path, size: int) -> int | None:
    """A whole shard, marked as just used; None if there is none. One of another size is deleted."""
    try:
        descriptor = os.open(shard, os.O_RDONLY)
    except FileNotFoundError:
        return None
    if os.fstat(descriptor).st_size != size:  # cut by somebody
        os.close(descriptor)
        shard.unlink(missing_ok=True)
        return None
    with suppress(OSError):  # deleted just now, or somebody else's file
        os.utime(shard)
    return descriptor
