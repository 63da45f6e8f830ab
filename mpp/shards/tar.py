"""What a tar holds: a walk over its headers, and its members grouped to samples as webdataset groups them.

Standard tars are not compressed, so that byte offsets found once give random access to every image.
"""

import itertools
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from mpp.decode import DamagedImage, image_size
from mpp.errors import UserError, cause, shown
from mpp.files import read_at

IMAGE_ENDINGS = frozenset(["jpg", "jpeg", "jpe", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm"])
BLOCK = 512  # bytes, of a tar header and the unit of its padding (POSIX.1-1988, ustar)
DIGITS = 19  # of any number in a pax header that can be true
LONGEST_NAME = 4096  # bytes, of a path (Linux's PATH_MAX)
LONGEST_HEADER = 2**20  # bytes of a pax header or a long name; real ones have hundreds
LONGEST_TEXT = 2**24  # bytes of a member that is no image, as far as it is looked at
PIECE = 2**16  # bytes that are read at a time: every read hands the interpreter to another thread
LARGEST_IMAGE = 2**30  # encoded bytes: more than decode.MAX_PIXELS in colour without any compression
MEMBER_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)  # webdataset 1.0.2, tariterators.base_plus_ext


class ShardError(UserError):
    """Something is wrong with shards, or with the images they are to be made of."""


# What a sample is labelled with, and a name for it, each empty without; from its key and a function that gives the
# content of its member of some ending, empty without and cut at LONGEST_TEXT. Raises ValueError.
Labeller = Callable[[str, Callable[[str], bytes]], tuple[str, str]]


class Sample(NamedTuple):
    """One image of a tar and what its neighbours of the same key say about it."""

    key: str
    offset: int
    size: int
    height: int
    width: int
    crc32: int
    damage: str  # the cause if its header cannot be read, else empty
    label: str  # what a Labeller found, empty without
    name: str


class Scan(NamedTuple):
    """What one tar holds."""

    path: Path
    bytes: int
    samples: list[Sample]
    without_image: int  # samples, left out
    links: int  # left out as well: what they name may lie anywhere


class Member(NamedTuple):
    """A regular file in a tar, or a link without data."""

    name: str
    offset: int  # bytes from the start of the tar to the data
    size: int
    link: bool


class Bytes:
    """A regular file that is read at any place, and closes when nothing refers to it any more.

    Never by a memory map: a file that is cut under a map kills the process.
    """

    def __init__(self, path: Path, name: Path | None = None, ahead: int = 0) -> None:
        """name: for messages, if not the path; ahead: bytes that are read at a time at least."""
        self.path, self._ahead = name or path, ahead
        self._piece = 0, b""  # (where, what) was read last
        self._number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would wait for a writer
        facts = os.fstat(self._number)
        if not stat.S_ISREG(facts.st_mode):
            raise OSError("no regular file")
        self.size = facts.st_size

    def read(self, offset: int, size: int) -> bytes:
        start, piece = self._piece
        if not start <= offset <= offset + size <= start + len(piece):
            start, piece = offset, read_at(self._number, max(size, self._ahead), offset)
            self._piece = (start, piece) if size < self._ahead else self._piece
        data = piece[offset - start : offset - start + size]
        if len(data) < min(size, self.size - offset):
            raise ShardError(f"{self.path}: became shorter while it was read; now it ends at byte {offset + len(data)}")
        return data

    def __del__(self) -> None:
        if hasattr(self, "_number"):
            os.close(self._number)


def scan_shard(path: str | Path, label: Labeller) -> Scan:
    """Finds the samples of a tar, neighbours whose names agree up to the first dot, and their labels."""
    path = Path(path)
    try:
        tar = Bytes(path, ahead=PIECE)
        if tar.size < BLOCK:
            raise ShardError(f"{path}: {tar.size} bytes, no tar")
        members = list(walk_tar(tar))
        samples = list(_samples(tar, [member for member in members if not member.link], label))
    except OSError as error:
        raise ShardError(f"{path}: cannot be read: {cause(error)}") from None
    images = [sample for sample in samples if sample is not None]
    return Scan(path, tar.size, images, len(samples) - len(images), sum(member.link for member in members))


def _samples(tar: Bytes, files: list[Member], label: Labeller) -> Iterator[Sample | None]:
    """One for each run of neighbours of the same key, None where no image is among them."""
    named = []  # (key, ending, member)
    for member in files:
        match = MEMBER_NAME.match(member.name)
        if not match and member.name.rpartition(".")[2].lower() in IMAGE_ENDINGS:
            yield None  # an image without a key, such as ".jpg"
        if match and not (member.name.startswith("__") and member.name.endswith("__")):  # webdataset's own
            named.append((match[1], match[2].lower(), member))
    for key, group in itertools.groupby(named, key=lambda entry: entry[0]):
        members: dict[str, Member] = {}
        for _, ending, member in group:
            if ending in members:
                raise ShardError(f"{tar.path}: {shown(member.name)} occurs twice")
            members[ending] = member
        yield _sample(tar, key, members, label)


def _sample(tar: Bytes, key: str, members: dict[str, Member], label: Labeller) -> Sample | None:
    def text(ending: str) -> bytes:
        member = members.get(ending)
        return tar.read(member.offset, min(member.size, LONGEST_TEXT)) if member else b""

    ending = next((ending for ending in members if ending in IMAGE_ENDINGS), None)
    if ending is None:
        return None
    place = members[ending]
    image = tar.read(place.offset, place.size) if place.size <= LARGEST_IMAGE else b""
    try:
        if place.size > LARGEST_IMAGE:
            raise DamagedImage(f"{place.size} bytes, more than the limit of {LARGEST_IMAGE}")
        h, w, damage = *image_size(image), ""
    except DamagedImage as error:
        h, w, damage = 0, 0, str(error)
    try:
        found, name = label(key, text)
    except ValueError as error:
        raise ShardError(f"{tar.path}: key {shown(key)}: {error}") from None
    return Sample(key, place.offset, place.size, h, w, zlib.crc32(image), damage, found, name)


def walk_tar(tar: Bytes) -> Iterator[Member]:
    """The files and links of a tar, from its headers alone.

    Knows ustar, GNU long names and sizes, and pax; a file that ends before its end mark is refused, since the
    images behind the cut would be lost without a word.
    """
    path, place, long_name = tar.path, 0, b""
    pax: dict[bytes, bytes] = {}
    while True:
        header = tar.read(place, BLOCK)
        if len(header) < BLOCK:
            raise ShardError(f"{path}: cut: it ends at byte {tar.size} without the end mark of a tar")
        if not any(header):
            return
        if not is_header(header):
            raise ShardError(f"{path}: no tar header at byte {place} (wrong checksum); damaged or compressed?")
        kind = header[156:157]
        size = int(pax.get(b"size", _number(header[124:136], path, place)))
        data = place + BLOCK
        has_data = kind not in b"123456"  # links, devices and folders
        place = data + (-(-size // BLOCK) * BLOCK if has_data else 0)
        if place > tar.size:
            raise ShardError(f"{path}: cut: it ends at byte {tar.size}, inside a member that goes to {data + size}")
        if kind in b"Lx" and size > LONGEST_HEADER:
            raise ShardError(f"{path}: a name or pax header of {size} bytes at byte {data - BLOCK}")
        if kind == b"L":
            long_name = tar.read(data, size).split(b"\0", 1)[0]
        elif kind == b"x":
            pax = _pax(tar.read(data, size), path)
        elif kind == b"S" or any(key.startswith(b"GNU.sparse") for key in pax):
            raise ShardError(f"{path}: a sparse file at byte {data - BLOCK}; write the tar without sparse files")
        elif kind not in b"Kg":
            name = pax.get(b"path") or long_name or _ustar_name(header)
            long_name, pax = b"", {}
            if len(name) > LONGEST_NAME:
                raise ShardError(f"{path}: a name of {len(name)} bytes; expected at most {LONGEST_NAME}")
            if kind in b"0127\0" and not name.endswith(b"/"):
                yield Member(name.decode("utf-8", "surrogateescape"), data, size, link=kind in b"12")


def is_header(block: bytes) -> bool:
    """Whether a block may begin a member, by its checksum, or end a tar."""
    if len(block) < BLOCK or not any(block):
        return len(block) == BLOCK
    digits = block[148:156].split(b"\0", 1)[0].strip()
    wanted = sum(block) - sum(block[148:156]) + 8 * 32  # as if the checksum were eight spaces
    return not digits.strip(b"01234567") and int(digits or b"0", 8) == wanted


def _number(field: bytes, path: Path, place: int) -> int:
    """A header's number: octal text, or GNU's base 256 where the first bit is set."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    if digits.strip(b"01234567"):
        raise ShardError(f"{path}: no tar header at byte {place}; damaged or compressed?")
    return int(digits or b"0", 8)


def _ustar_name(header: bytes) -> bytes:
    name, prefix = (part.split(b"\0", 1)[0] for part in (header[:100], header[345:500]))
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _pax(data: bytes, path: Path) -> dict[bytes, bytes]:
    """The records "LENGTH KEY=VALUE\\n" of a pax header (POSIX.1-2001)."""
    records, place = {}, 0
    data = data.rstrip(b"\0")
    while place < len(data):
        length, _, _ = data[place : place + DIGITS + 1].partition(b" ")
        number = int(length) if length.isdigit() and len(length) <= DIGITS else 0
        record = data[place + len(length) + 1 : place + number - 1]
        if not 0 < number <= len(data) - place or b"=" not in record:
            raise ShardError(f"{path}: a damaged pax header")
        key, _, value = record.partition(b"=")
        if key == b"size" and not (value.isdigit() and len(value) <= DIGITS):
            raise ShardError(f"{path}: a damaged pax header")
        records[key] = value
        place += number
    return records
