"""What a tar holds: a walk over its headers, and its members grouped to samples as webdataset groups them.

Standard tars are not compressed, so that byte offsets found once give random access to every image.
"""

import itertools
import json
import mmap
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mpp.data.decode import DamagedImage, image_size
from mpp.errors import UserError, cause, shown

IMAGE_ENDINGS = frozenset(["jpg", "jpeg", "jpe", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm"])
BLOCK = 512  # bytes, of a tar header and the unit of its padding (POSIX.1-1988, ustar)
DIGITS = 19  # of any number in a pax header that can be true
MEMBER_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)  # webdataset 1.0.2, tariterators.base_plus_ext


class ShardError(UserError):
    """Something is wrong with shards, or with the images they are to be made of."""


class Sample(NamedTuple):
    """One image of a tar and what its neighbours of the same key say about it."""

    key: str
    offset: int
    size: int
    height: int
    width: int
    crc32: int
    damage: str  # the cause if its header cannot be read, else empty
    label: str  # the text of `cls`, empty without
    name: str  # "class" of the json member, which our own shards hold, empty without


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


def scan_shard(path: str | Path) -> Scan:
    """Finds the samples of a tar: neighbours whose names agree up to the first dot."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < BLOCK:
                raise ShardError(f"{path}: {size} bytes, no tar")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as tar:
                members = list(walk_tar(tar, path))
                samples = list(_samples(tar, [member for member in members if not member.link], path))
    except OSError as error:
        raise ShardError(f"{path}: cannot be read: {cause(error)}") from None
    images = [sample for sample in samples if sample is not None]
    return Scan(path, size, images, len(samples) - len(images), sum(member.link for member in members))


def _samples(tar: mmap.mmap, files: list[Member], path: Path) -> Iterator[Sample | None]:
    """One for each run of neighbours of the same key, None where no image is among them."""
    named = []  # (key, ending, member)
    for member in files:
        match = MEMBER_NAME.match(member.name)
        if match and not (member.name.startswith("__") and member.name.endswith("__")):  # webdataset's own
            named.append((match[1], match[2].lower(), member))
    for key, group in itertools.groupby(named, key=lambda entry: entry[0]):
        members: dict[str, Member] = {}
        for _, ending, member in group:
            if ending in members:
                raise ShardError(f"{path}: {shown(member.name)} occurs twice")
            members[ending] = member
        yield _sample(tar, key, members)


def _sample(tar: mmap.mmap, key: str, members: dict[str, Member]) -> Sample | None:
    def content(ending: str) -> bytes:
        member = members.get(ending)
        return tar[member.offset : member.offset + member.size] if member else b""

    ending = next((ending for ending in members if ending in IMAGE_ENDINGS), None)
    if ending is None:
        return None
    image, place = content(ending), members[ending]
    try:
        h, w, damage = *image_size(image), ""
    except DamagedImage as error:
        h, w, damage = 0, 0, str(error)
    label = content("cls").decode("utf-8", "replace").strip()
    try:
        facts = json.loads(content("json") or b"{}")
    except (ValueError, RecursionError):
        facts = {}  # img2dataset and others may hold anything here
    name = facts.get("class") if isinstance(facts, dict) else None
    name = name if isinstance(name, str) else ""
    return Sample(key, place.offset, place.size, h, w, zlib.crc32(image), damage, label, name)


def walk_tar(tar: mmap.mmap, path: Path) -> Iterator[Member]:
    """The files and links of a tar, from its headers alone: 15 times as fast as `tarfile`.

    Knows ustar, GNU long names and sizes, and pax; a file that ends before its end mark is refused, since the
    images behind the cut would be lost without a word.
    """
    place, long_name = 0, b""
    pax: dict[bytes, bytes] = {}
    while True:
        header = tar[place : place + BLOCK]
        if len(header) < BLOCK:
            raise ShardError(f"{path}: cut: it ends at byte {len(tar)} without the end mark of a tar")
        if not any(header):
            return
        if sum(header) - sum(header[148:156]) + 8 * 32 != _number(header[148:156], path, place):
            raise ShardError(f"{path}: no tar header at byte {place} (wrong checksum); damaged or compressed?")
        kind = header[156:157]
        size = int(pax.get(b"size", _number(header[124:136], path, place)))
        data = place + BLOCK
        has_data = kind not in b"123456"  # links, devices and folders
        place = data + (-(-size // BLOCK) * BLOCK if has_data else 0)
        if place > len(tar):
            raise ShardError(f"{path}: cut: it ends at byte {len(tar)}, inside a member that goes to {data + size}")
        if kind == b"L":
            long_name = tar[data : data + size].split(b"\0", 1)[0]
        elif kind == b"x":
            pax = _pax(tar[data : data + size], path)
        elif kind == b"S" or any(key.startswith(b"GNU.sparse") for key in pax):
            raise ShardError(f"{path}: a sparse file at byte {data - BLOCK}; write the tar without sparse files")
        elif kind not in b"Kg":
            name = pax.get(b"path") or long_name or _ustar_name(header)
            long_name, pax = b"", {}
            if kind in b"0127\0" and not name.endswith(b"/"):
                yield Member(name.decode("utf-8", "surrogateescape"), data, size, link=kind in b"12")


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
    records = {}
    while data.strip(b"\0"):
        length, _, rest = data.partition(b" ")
        number = int(length) if length.isdigit() and len(length) <= DIGITS else 0
        if not 0 < number <= len(data) or b"=" not in rest:
            raise ShardError(f"{path}: a damaged pax header")
        key, _, value = data[len(length) + 1 : number - 1].partition(b"=")
        if key == b"size" and not (value.isdigit() and len(value) <= DIGITS):
            raise ShardError(f"{path}: a damaged pax header")
        records[key] = value
        data = data[number:]
    return records
