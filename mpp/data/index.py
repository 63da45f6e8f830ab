"""The index of a split of WebDataset shards: where each image lies in which tar, how large it is, and its label.

It is one safetensors file a split, OUT/SPLIT-index.safetensors: arrays over the n images and one JSON string. It is
made from the tars alone (`mpp shards index`), and trusted only as long as their sizes on disk agree with it.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tqdm import tqdm

from mpp.data.tar import Scan, ShardError, scan_shard
from mpp.errors import cause, shown
from mpp.files import write_atomically

SUFFIX = "-index.safetensors"
UNFINISHED = "make.unfinished.json"  # stands in the folder while `mpp shards make` is not done
CLASS_DIGITS = 6  # longer integers in `cls` are identifiers, not classes


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

    def select(self, numbers: np.ndarray) -> "Index":
        """The same split with these images (k,) alone, in that order."""
        keys = [self.key_bytes[self.key_ends[i - 1] if i else 0 : self.key_ends[i]] for i in numbers.tolist()]
        rows = {name: getattr(self, name)[numbers] for name in ARRAYS if not name.startswith("key_")}
        ends = np.cumsum([len(key) for key in keys], dtype=np.int64)
        return replace(self, **rows, key_bytes=np.concatenate([self.key_bytes[:0], *keys]), key_ends=ends)

    def key(self, i: int) -> str:
        start = self.key_ends[i - 1] if i else 0
        return self.key_bytes[start : self.key_ends[i]].tobytes().decode("utf-8", "surrogateescape")


ARRAYS = tuple(field.name for field in fields(Index) if field.type is np.ndarray)
FACTS = ("shards", "shard_bytes", "classes", "mode")
NO_INDEX = (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError)  # what foreign files cause


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
    path, again = folder / (split + SUFFIX), f"run `mpp shards index {folder}`"
    if not path.is_file() or (folder / UNFINISHED).is_file():
        raise no_index(folder, split)
    try:
        index = _loaded(folder, split)
    except NO_INDEX as error:
        raise ShardError(f"{path}: cut, or no index of mpp ({cause(error)}); {again}") from None
    for name, size in zip(index.shards, index.shard_bytes, strict=True):
        if not (folder / name).is_file():
            raise ShardError(f"{folder / name}: missing, though the index names it; restore it or {again}")
        if (found := (folder / name).stat().st_size) != size:
            raise ShardError(
                f"{folder / name}: {found} bytes, the index says {size}; cut or changed? restore it or {again}"
            )
    return index


def _loaded(folder: Path, split: str) -> Index:
    """An index that agrees with itself; whether it does with its tars is another question."""
    with safe_open(folder / (split + SUFFIX), framework="np") as file:
        facts = json.loads((file.metadata() or {})["mpp"])
        arrays = {name: file.get_tensor(name) for name in ARRAYS}
    shards, sizes, classes = (tuple(facts[name]) for name in ("shards", "shard_bytes", "classes"))
    index = Index(folder, split, shards, sizes, classes, facts["mode"], **arrays)
    lengths = {len(arrays[name]) for name in ARRAYS if name != "key_bytes"}
    if lengths != {len(index)} or len(shards) != len(sizes) or index.mode not in ("RGB", "L"):
        raise ValueError("its parts do not fit together")
    ends = np.array(sizes, np.int64)[index.shard]
    if (index.offset < 0).any() or (index.size < 0).any() or (index.offset + index.size > ends).any():
        raise ValueError("its images lie outside its shards")
    return index


def no_index(folder: Path, split: str) -> ShardError:
    """The error that says why a folder has no index of a split, and what to do."""
    if not folder.is_dir():
        if folder.exists():
            return ShardError(f"{folder}: a file, not a folder of shards")
        return ShardError(f"{folder}: no such folder; make it with `mpp shards make SOURCE {folder}`")
    if (folder / UNFINISHED).is_file():
        return ShardError(f"{folder}: an unfinished `mpp shards make`; run it again to go on")
    if present := splits(folder):
        return ShardError(f"{folder}: no split {split!r}; it holds {', '.join(present)}")
    if any(folder.glob("*.tar")):
        return ShardError(f"{folder}: tars without an index; run `mpp shards index {folder}`")
    return ShardError(f"{folder}: no shards (*.tar) here; make them with `mpp shards make SOURCE {folder}`")


def index_folder(folder: str | Path, split: str | None = None, report: Callable[[str], None] = print) -> list[Index]:
    """Indexes all tars of a folder; `split` names those that are only numbered (img2dataset's 00000.tar).

    Labels mean the same in every split: classes are collected over all of them.
    """
    folder = Path(folder)
    if split is not None and (not split or "/" in split):
        raise ShardError(f"a split is part of a file name, got {split!r}")
    paths = sorted(folder.glob("*.tar"))
    if (folder / UNFINISHED).is_file() or not paths:
        raise no_index(folder, split or "train")
    groups: dict[str, list[Scan]] = {}
    for scan in scan_shards(paths):
        groups.setdefault(re.sub(r"[-_.]?\d*$", "", scan.path.stem) or split or "train", []).append(scan)
    classes, numbers = _classes([scan for scans in groups.values() for scan in scans])
    made = []
    for name, scans in groups.items():
        made.append(build_index(folder, name, scans, classes, numbers, _old_mode(folder, name), report))
    for index in made:  # only when all of them are sound
        write_index(index)
    return made


def scan_shards(paths: Sequence[Path], progress: bool = True) -> list[Scan]:
    """Scans tars side by side."""
    with ThreadPoolExecutor() as pool:
        return list(tqdm(pool.map(scan_shard, paths), "index", len(paths), unit="shard", disable=not progress))


def _old_mode(folder: Path, split: str) -> str:
    """The mode of an index that is there already, even if it no longer agrees with its tars; else RGB."""
    try:
        return _loaded(folder, split).mode
    except NO_INDEX:
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

    damaged = np.array([sample.damage != "" for sample in samples], np.bool_)
    for i in np.flatnonzero(damaged).tolist():
        report(f"{shown(scans[shard[i]].path.name)} {shown(keys[i])}: {samples[i].damage}")
    name = shown(split)
    report(f"{name}: {len(samples)} images in {len(scans)} shards, {len(classes)} classes, {damaged.sum()} damaged")
    if without := sum(scan.without_image for scan in scans):
        report(f"{name}: left out {without} samples without an image")
    if links := sum(scan.links for scan in scans):
        report(f"{name}: left out {links} links")
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
        damaged=damaged,
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
    if long := [text for text in texts if len(text.lstrip("0")) > CLASS_DIGITS]:
        raise ShardError(f"cls holds {long[0][:20]}; integers of more than {CLASS_DIGITS} digits are no classes")
    numbers = {text: int(text) for text in texts}
    names = {numbers[text]: name for text, name in pairs if name and text in numbers}
    return tuple(names.get(label, str(label)) for label in range(max(numbers.values()) + 1)), numbers
