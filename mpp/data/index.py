"""The index of a split of WebDataset shards: where each image lies in which tar, how large it is, and its label.

Standard tars are not compressed, so byte offsets give random access. The index is one safetensors file a split,
OUT/SPLIT-index.safetensors, arrays over the n images and one JSON string. It is made from the tars alone
(`mpp shards index`), and trusted only as long as their sizes on disk agree with it.
"""

import json
import mmap
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tqdm import tqdm

from mpp.data.decode import DamagedImage, decode, image_size

IMAGE_ENDINGS = frozenset(["jpg", "jpeg", "jpe", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm"])
SUFFIX = "-index.safetensors"
UNFINISHED = "make.unfinished.json"  # stands in the folder while `mpp shards make` is not done
BLOCK = 512  # bytes, of a tar header and the unit of its padding (POSIX.1-1988, ustar)
MEMBER_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)  # webdataset 1.0.2, tariterators.base_plus_ext
MAX_CLASSES = 1_000_000  # larger integers in `cls` are identifiers, not classes
CHECK_CHUNK = 256  # images decoded by one task of `check_folder`


class ShardError(ValueError):
    """Something about shards that the user can mend, said in one line that names the file."""


@dataclass(frozen=True)
class Index:
    """All images of one split in the order of the tars; arrays are (n,) unless said otherwise."""

    folder: Path
    split: str
    shards: tuple[str, ...]  # file names in `folder`
    shard_bytes: tuple[int, ...]
    classes: tuple[str, ...]  # names by label; empty without labels
    mode: str  # "RGB" or "L": how images are to be decoded
    shard: np.ndarray  # int32, position in `shards`
    offset: np.ndarray  # int64, bytes from the start of the tar to the image
    size: np.ndarray  # int64, bytes of the encoded image
    height: np.ndarray  # int32, pixels of the upright image; 0 if its header is damaged
    width: np.ndarray  # int32
    label: np.ndarray  # int32, -1 for none
    crc32: np.ndarray  # uint32, of the encoded bytes
    damaged: np.ndarray  # bool
    key_bytes: np.ndarray  # uint8 (all keys in utf-8, one behind the other)
    key_ends: np.ndarray  # int64, where each key ends in key_bytes

    def __len__(self) -> int:
        return len(self.offset)

    def key(self, i: int) -> str:
        start = self.key_ends[i - 1] if i else 0
        return self.key_bytes[start : self.key_ends[i]].tobytes().decode("utf-8", "surrogateescape")


ARRAYS = tuple(field.name for field in fields(Index) if field.type is np.ndarray)
FACTS = ("shards", "shard_bytes", "classes", "mode")


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


# --- files ---------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, data: bytes) -> None:
    """Readers see the old file or the whole new one, also after a power cut."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise ShardError(f"{path}: cannot be written: {error.strerror or error}") from None


def write_index(index: Index) -> Path:
    facts = {name: getattr(index, name) for name in FACTS}
    path = index.folder / (index.split + SUFFIX)
    arrays = {name: np.ascontiguousarray(getattr(index, name)) for name in ARRAYS}
    write_atomically(path, save(arrays, {"mpp": json.dumps(facts)}))
    return path


def splits(folder: str | Path) -> list[str]:
    """The splits that have an index in `folder`."""
    return sorted(path.name.removesuffix(SUFFIX) for path in Path(folder).glob("*" + SUFFIX))


def read_index(folder: str | Path, split: str) -> Index:
    """The index of a split, after a look at every tar's size; ShardError says what is missing and what to do."""
    folder = Path(folder)
    path = folder / (split + SUFFIX)
    if not path.is_file():
        raise ShardError(_why_missing(folder, split))
    again = f"run `mpp shards index {folder}`"
    try:
        with safe_open(path, framework="np") as file:
            facts = json.loads((file.metadata() or {})["mpp"])
            arrays = {name: file.get_tensor(name) for name in ARRAYS}
        shards, sizes, classes = (tuple(facts[name]) for name in ("shards", "shard_bytes", "classes"))
        index = Index(folder, split, shards, sizes, classes, facts["mode"], **arrays)
        inside = index.offset + index.size <= np.array(index.shard_bytes, np.int64)[index.shard]
        whole = {len(arrays[name]) for name in ARRAYS if name != "key_bytes"} == {len(index)}
    except (SafetensorError, OSError, ValueError, LookupError) as error:
        raise ShardError(f"{path}: cut, or no index of mpp ({_line(error)}); {again}") from None
    if not (whole and inside.all()):
        raise ShardError(f"{path}: its images lie outside its shards; {again}")
    for name, size in zip(index.shards, index.shard_bytes, strict=True):
        if not (folder / name).is_file():
            raise ShardError(f"{folder / name}: missing, though the index names it; restore it or {again}")
        found = (folder / name).stat().st_size
        if found != size:
            found_now = f"{found} bytes, the index says {size}"
            raise ShardError(f"{folder / name}: {found_now}; cut or changed? restore it or {again}")
    return index


def _why_missing(folder: Path, split: str) -> str:
    if not folder.is_dir():
        return f"{folder}: no such folder"
    if (folder / UNFINISHED).is_file():
        return f"{folder}: an unfinished `mpp shards make`; run it again to go on"
    if present := splits(folder):
        return f"{folder}: no split {split!r}; it holds {', '.join(present)}"
    if any(folder.glob("*.tar")):
        return f"{folder}: tars without an index; run `mpp shards index {folder}`"
    return f"{folder}: no shards (*.tar) here; make them with `mpp shards make SOURCE {folder}`"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def shown(name: str) -> str:
    """A name from a foreign file, safe to print on one line."""
    return name if name.isprintable() else ascii(name)


# --- reading tars --------------------------------------------------------------------------------------------------


def scan_shard(path: str | Path) -> Scan:
    """Finds the samples of a tar as webdataset groups them: neighbours whose names agree up to the first dot."""
    path = Path(path)
    try:
        return _scan(path)
    except OSError as error:
        raise ShardError(f"{path}: cannot be read: {error.strerror or error}") from None


def _scan(path: Path) -> Scan:
    samples: list[Sample] = []
    members: dict[str, tuple[int, int]] = {}  # of the current sample: (offset, size) by ending
    without_image, current = 0, ""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < BLOCK:
            raise ShardError(f"{path}: {size} bytes, no tar")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as tar:
            for key, ending, offset, length in [*_named_members(tar, path), ("", "", 0, 0)]:
                if key != current:
                    if members:
                        sample = _sample(tar, current, members)
                        samples += [sample] if sample else []
                        without_image += sample is None
                    current, members = key, {}
                if ending in members:
                    raise ShardError(f"{path}: {shown(f'{key}.{ending}')} occurs twice")
                members[ending] = (offset, length)
    return Scan(path, size, samples, without_image)


def _named_members(tar: mmap.mmap, path: Path) -> Iterator[tuple[str, str, int, int]]:
    """(key, ending, offset, size) of the regular files that have an ending; `__NAME__` is webdataset's own."""
    for name, offset, length in walk_tar(tar, path):
        text = name.decode("utf-8", "surrogateescape")
        found = MEMBER_NAME.match(text)
        if found and not (text.startswith("__") and text.endswith("__")):
            yield found[1], found[2].lower(), offset, length


def _sample(tar: mmap.mmap, key: str, members: dict[str, tuple[int, int]]) -> Sample | None:
    def content(ending: str) -> bytes:
        offset, length = members.get(ending, (0, 0))
        return tar[offset : offset + length]

    ending = next((ending for ending in members if ending in IMAGE_ENDINGS), None)
    if ending is None:
        return None
    image = content(ending)
    try:
        h, w, damage = *image_size(image), ""
    except DamagedImage as error:
        h, w, damage = 0, 0, str(error)
    label = content("cls").decode("utf-8", "replace").strip()
    try:
        facts = json.loads(content("json") or b"{}")
    except ValueError:
        facts = {}  # img2dataset and others may hold anything here
    name = facts.get("class") if isinstance(facts, dict) else None
    return Sample(key, *members[ending], h, w, zlib.crc32(image), damage, label, name if isinstance(name, str) else "")


def walk_tar(tar: mmap.mmap, path: Path) -> Iterator[tuple[bytes, int, int]]:
    """(name, offset, size) of each regular file: a walk over the headers, 15 times as fast as `tarfile`.

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
            if kind in b"07\0" and not name.endswith(b"/"):
                yield name, data, size


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
        if not length.isdigit() or not 0 < int(length) <= len(data) or b"=" not in rest:
            raise ShardError(f"{path}: a damaged pax header")
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        if key == b"size" and not value.isdigit():
            raise ShardError(f"{path}: a damaged pax header")
        records[key] = value
        data = data[int(length) :]
    return records


# --- making and checking -------------------------------------------------------------------------------------------


def index_folder(
    folder: str | Path, split: str | None = None, mode: str | None = None, report: Callable[[str], None] = print
) -> list[Index]:
    """Indexes all tars of a folder; `split` names those that are only numbered (img2dataset's 00000.tar).

    Labels mean the same in every split: classes are collected over all of them. Without `mode` an index that is
    there already keeps its own.
    """
    folder = Path(folder)
    if (folder / UNFINISHED).is_file() or not any(folder.glob("*.tar")):
        raise ShardError(_why_missing(folder, split or "train"))
    groups: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.tar")):
        groups.setdefault(re.sub(r"[-_.]?\d*$", "", path.stem) or split or "train", []).append(path)
    paths = [path for group in groups.values() for path in group]
    with ThreadPoolExecutor() as pool:
        scans = dict(zip(paths, tqdm(pool.map(scan_shard, paths), "index", len(paths), unit="shard"), strict=True))
    classes, numbers = _classes(list(scans.values()))
    made = []
    for name, group in groups.items():
        old = mode or (read_mode(folder, name) if (folder / (name + SUFFIX)).is_file() else "RGB")
        made.append(build_index(folder, name, [scans[path] for path in group], classes, numbers, old, report))
    for index in made:  # only when all of them are sound
        write_index(index)
    return made


def read_mode(folder: Path, split: str) -> str:
    """The mode of an index that may no longer agree with its tars."""
    try:
        with safe_open(folder / (split + SUFFIX), framework="np") as file:
            return json.loads((file.metadata() or {})["mpp"])["mode"]
    except (SafetensorError, OSError, ValueError, LookupError):
        return "RGB"


def build_index(
    folder: Path,
    split: str,
    scans: Sequence[Scan],
    classes: Sequence[str],
    numbers: dict[str, int],
    mode: str,
    report: Callable[[str], None],
) -> Index:
    """One split's index from its scanned tars; `numbers` gives the label of each text found in `cls`."""
    samples = [sample for scan in scans for sample in scan.samples]
    shard = np.repeat(np.arange(len(scans), dtype=np.int32), [len(scan.samples) for scan in scans])
    keys = [sample.key for sample in samples]
    if len(set(keys)) < len(keys):
        key = Counter(keys).most_common(1)[0][0]
        places = [scans[shard[i]].path.name for i, other in enumerate(keys) if other == key]
        where = ", ".join(places[:4])
        raise ShardError(f"{folder}: key {shown(key)} occurs {len(places)} times in {split}: in {where}")
    encoded = [key.encode("utf-8", "surrogateescape") for key in keys]

    def column(name: str, dtype: type) -> np.ndarray:
        return np.array([getattr(sample, name) for sample in samples], dtype)

    damaged = [i for i, sample in enumerate(samples) if sample.damage]
    for i in damaged:
        report(f"{scans[shard[i]].path.name} {shown(keys[i])}: {samples[i].damage}")
    report(f"{split}: {len(samples)} images in {len(scans)} shards, {len(classes)} classes, {len(damaged)} damaged")
    if without := sum(scan.without_image for scan in scans):
        report(f"{split}: left out {without} samples without an image")
    return Index(
        folder=folder,
        split=split,
        shards=tuple(scan.path.name for scan in scans),
        shard_bytes=tuple(scan.bytes for scan in scans),
        classes=tuple(classes),
        mode=mode,
        shard=shard,
        offset=column("offset", np.int64),
        size=column("size", np.int64),
        height=column("height", np.int32),
        width=column("width", np.int32),
        label=np.array([numbers.get(sample.label, -1) for sample in samples], np.int32),
        crc32=column("crc32", np.uint32),
        damaged=np.array([sample.damage != "" for sample in samples], np.bool_),
        key_bytes=np.frombuffer(b"".join(encoded), np.uint8),
        key_ends=np.cumsum([len(key) for key in encoded], dtype=np.int64),
    )


def _classes(scans: Sequence[Scan]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Class names by label, and the label of each text in `cls`: integers stay, names are numbered in sorted order."""
    pairs = {(sample.label, sample.name) for scan in scans for sample in scan.samples if sample.label}
    texts = {text for text, _ in pairs} - {"-1"}
    if not texts:
        return (), {}
    if not all(re.fullmatch("[0-9]+", text) for text in texts):
        return tuple(sorted(texts)), {text: label for label, text in enumerate(sorted(texts))}
    numbers = {text: int(text) for text in texts}
    if max(numbers.values()) >= MAX_CLASSES:
        raise ShardError(f"cls holds {max(numbers.values())}; integers of {MAX_CLASSES} and more are no classes")
    names = {int(text): name for text, name in pairs if name and text in numbers}
    return tuple(names.get(label, str(label)) for label in range(max(numbers.values()) + 1)), numbers


def check_folder(folder: str | Path, mark: bool = False, report: Callable[[str], None] = print) -> int:
    """Decodes every image and compares checksums; returns how many are bad and lists each with its cause.

    With `mark` the index remembers them, so that training draws no replacement for them again and again.
    """
    folder = Path(folder)
    if not splits(folder):
        raise ShardError(_why_missing(folder, "train"))
    count = 0
    for split in splits(folder):
        index = read_index(folder, split)
        bad = _bad_images(index)
        for i, cause in bad.items():
            report(f"{index.shards[index.shard[i]]} {shown(index.key(i))}: {cause}")
        if mark:
            write_index(replace(index, damaged=np.isin(np.arange(len(index)), list(bad))))
        report(f"{split}: {len(index)} images checked, {len(bad)} bad{', marked in the index' if mark and bad else ''}")
        count += len(bad)
    return count


def _bad_images(index: Index) -> dict[int, str]:
    """The cause for each image that does not decode to what the index says."""
    bad: dict[int, str] = {}
    with ThreadPoolExecutor() as pool, tqdm(desc=f"check {index.split}", total=len(index), unit="image") as bar:
        for shard, name in enumerate(index.shards):
            with open(index.folder / name, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as tar:
                inside = np.flatnonzero(index.shard == shard)
                chunks = np.split(inside, range(CHECK_CHUNK, len(inside), CHECK_CHUNK))
                for found in pool.map(lambda chunk: _check_images(index, tar, chunk), chunks):
                    bad |= found
                bar.update(len(inside))
    return bad


def _check_images(index: Index, tar: mmap.mmap, chunk: np.ndarray) -> dict[int, str]:
    bad: dict[int, str] = {}
    for i in chunk.tolist():
        data = tar[index.offset[i] : index.offset[i] + index.size[i]]
        try:
            image = decode(data, index.mode)
        except DamagedImage as error:
            bad[i] = str(error)
            continue
        if zlib.crc32(data) != index.crc32[i]:
            bad[i] = "its bytes have changed since the index was made (checksum)"
        elif image.shape[:2] != (index.height[i], index.width[i]):
            bad[i] = f"{image.shape[1]}x{image.shape[0]} pixels, the index says {index.width[i]}x{index.height[i]}"
    return bad
