"""What reading a file of strangers may cost, counted in work: bytes, members, values, nesting. Never in seconds.

A file that many trust is read whole however large it is; one that asks for much more work than its size stands for is
refused before the work is done. Every reader goes through here: nothing but a regular file is opened (a pipe would
wait for a writer, a device never end), and what a file claims is held against what it has.

Readers say which file it is: an Overrun tells what ran over, and the limit.
"""

import io
import json
import os
import stat
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Expanded bytes: a file may become this many times its size, and RATIO_FREE more. Pictures and weights pack to a half,
# plain-coloured bitmaps to a fiftieth; deflate could go to 1/1032, and overlapping members further.
RATIO, RATIO_FREE = 100, 2**28
MOST_JSON = 2**27  # bytes of one JSON: an index or classifier of 100,000 classes with names of 256 characters has 2**25
MOST_VALUES = 2**22  # in one JSON, which cost up to 100 bytes each: 400 MB. 100,000 classes with ten scores are 2**20
MOST_LINE = 2**24  # bytes of one line of metrics.jsonl, whose numbers take some hundred
DEEPEST = 64  # containers in containers; ours go to 8, config.json of others to 5
MOST_DIRECTORY = 2**30  # bytes of a zip's list of members: ten million pictures
MOST_HEADER = 100_000_000  # bytes of a header of safetensors (the library's own limit)
MOST_TENSORS = 2**18  # in one file; a mixture of 128 experts in 60 layers has 2**15, and Adam trebles it
MOST_TEXT = 2**25  # bytes of one recipe: 100,000 names of classes with 256 characters and their indentation


class Overrun(ValueError):
    """A file asks for more work than its size stands for; the message says what ran over, and the limit."""


def hold(found: int, limit: int, what: str) -> None:
    """Raises Overrun where there is more than the limit."""
    if found > limit:
        raise Overrun(f"{found} {what}, more than the limit of {limit}")


class Work:
    """So much of one kind of work as a reader may do on a file."""

    def __init__(self, limit: int, what: str) -> None:
        self._left, self._limit, self._what = limit, limit, what

    def spend(self, count: int = 1) -> None:
        self._left -= count
        if self._left < 0:
            raise Overrun(f"more than {self._limit} {self._what}, the limit")


def hold_expanded(needed: int, size: int) -> None:
    """Raises Overrun for what a file of that size can't honestly hold: packed, or as one number that is repeated."""
    if needed > RATIO * size + RATIO_FREE:
        raise Overrun(f"claims {needed} bytes in a file of {size}, more than the limit of {RATIO * size + RATIO_FREE}")


def opened(path: str | Path) -> io.BufferedReader:
    """A regular file, open for reading; OSError for anything else, without waiting for it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("no regular file")
    return open(descriptor, "rb")


def is_file(path: str | Path) -> bool:
    """Whether there is a regular file; names that can be none, as too long ones, are of none."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def content(path: str | Path, most: int) -> bytes:
    """The bytes of a regular file; Overrun for more than `most`."""
    with opened(path) as file:
        hold(os.fstat(file.fileno()).st_size, most, "bytes")
        data = file.read(most + 1)  # files of /proc have a size of 0
    hold(len(data), most, "bytes")
    return data


def text(path: str | Path) -> str:
    """A text in UTF-8, as a recipe is."""
    return content(path, MOST_TEXT).decode()


def lines(path: str | Path) -> Iterator[str]:
    """The lines of a text, with their ends; a line that is too long comes in pieces, which are no JSON."""
    with opened(path) as file:
        while line := file.readline(MOST_LINE):
            yield line.decode("utf-8", "replace")


def json_of(data: str | bytes) -> Any:
    """What a JSON says; ValueError if it is none, Overrun (one as well) for too many values or too deep ones."""
    hold(len(data), MOST_JSON, "bytes of JSON")
    raw = data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass")
    hold(sum(raw.count(mark) for mark in (b",", b"[", b"{")), MOST_VALUES, "values in JSON")
    try:
        found = json.loads(data)
    except RecursionError:
        raise Overrun(f"JSON nested deeper than the limit of {DEEPEST}") from None
    level = [found]
    for _ in range(DEEPEST + 1):
        level = [one for one in level if isinstance(one, dict | list)]
        level = [part for one in level for part in (one.values() if isinstance(one, dict) else one)]
        if not level:
            return found
    raise Overrun(f"JSON nested deeper than the limit of {DEEPEST}")


def json_file(path: str | Path) -> Any:
    """What a file of JSON says."""
    return json_of(content(path, MOST_JSON))


class _Bounded(io.BufferedReader):
    """A file that gives no more than `most` bytes at a time."""

    most: int | None = None

    def read(self, size: int | None = -1, /) -> bytes:
        if self.most is None or (size is not None and 0 <= size <= self.most):
            return super().read(size)
        data = super().read(self.most + 1)
        hold(len(data), self.most, "bytes of a list of members")
        return data


def _zip(file: _Bounded) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except Overrun:
        raise
    except (ValueError, ArithmeticError, LookupError, struct.error) as error:  # of names that are no text, and places
        raise zipfile.BadZipFile(f"its list of members is damaged ({error})") from error


@contextmanager
def zip_archive(path: str | Path, most: int = MOST_DIRECTORY) -> Iterator[zipfile.ZipFile]:
    """A zip archive whose members lie one behind the other and don't claim too much; `most` bytes of their list.

    Raises Overrun, OSError, zipfile.BadZipFile or NotImplementedError.
    """
    raw = opened(path).detach()
    with _Bounded(raw) as file:
        file.most = most  # zipfile reads the whole list of members at once
        with _zip(file) as archive:
            file.most = None
            size, end = os.fstat(file.fileno()).st_size, 0
            hold_expanded(sum(member.file_size for member in archive.infolist()), size)
            for member in sorted(archive.infolist(), key=lambda member: member.header_offset):
                if member.header_offset < end:
                    raise Overrun("members that lie over each other")
                end = member.header_offset + 30 + member.compress_size  # 30: a member's own header without its name
            yield archive


def check_safetensors(path: str | Path) -> None:
    """Raises Overrun for a header that would take too much; what else is wrong safetensors says itself, or OSError."""
    with opened(path) as file:
        size = int.from_bytes(file.read(8), "little")
        hold(size, MOST_HEADER, "bytes of header")
        hold(file.read(size).count(b'"data_offsets"'), MOST_TENSORS, "tensors")
