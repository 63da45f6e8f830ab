"""The index of a split of WebDataset shards: where each image lies in which tar, how large it is, and its label.

It is one safetensors file a split, OUT/SPLIT-index.safetensors: arrays over the n images and one JSON string. It is
made from the tars alone (`mpp shards index`), and trusted only as long as their sizes on disk agree with it.
"""

import os
import stat
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mpp import budget, jsons
from mpp.decode import MAX_PIXELS
from mpp.errors import cause, shown
from mpp.files import refuse_unreadable, write_atomically
from mpp.jsons import encoded
from mpp.remote.fetch import read_small
from mpp.remote.urls import below, check_url, is_url, kept_url, shown_url
from mpp.shards.tar import ShardError

SUFFIX = "-index.safetensors"
PRIVATE = "-index.private.json"  # beside it, for its owner alone: shards by URL with their users, passwords and queries
UNFINISHED = "make.unfinished.json"  # stands in the folder while `mpp shards make` is not done
MOST_BYTES = 2**34  # of an index that is fetched: some 200 million images


@dataclass(frozen=True)
class Index:
    """All images of one split in the order of the tars; arrays are (n,) unless said otherwise."""

    folder: Path
    split: str
    shards: tuple[str, ...]  # file names in `folder`, or URLs
    shard_bytes: tuple[int, ...]
    classes: tuple[str, ...]  # names by label; empty without labels
    mode: str  # "RGB" or "L": how images are to be decoded
    shard: np.ndarray  # position in `shards`
    offset: np.ndarray  # bytes from the start of the tar to the image
    size: np.ndarray  # bytes of the encoded image
    height: np.ndarray  # pixels of the upright image; 0 if its header is damaged
    width: np.ndarray
    label: np.ndarray  # -1 for none
    crc32: np.ndarray  # of the encoded bytes
    damaged: np.ndarray
    key_bytes: np.ndarray  # all keys in utf-8, one behind the other
    key_ends: np.ndarray  # where each key ends in key_bytes
    url: str = ""  # of the folder, where it is a remote one
    labels: str = "cls"  # where they come from: the choice of `mpp shards index --labels`

    def __len__(self) -> int:
        return len(self.offset)

    @property
    def channels(self) -> int:
        return 1 if self.mode == "L" else 3

    @property
    def origin(self) -> str:
        """The folder or its URL, for messages."""
        return shown_url(self.url or str(self.folder))

    @property
    def remote(self) -> bool:
        return any(map(is_url, self.shards))

    def place(self, shard: int) -> str:
        """The path or URL of a shard."""
        return self.shards[shard] if is_url(self.shards[shard]) else str(self.folder / self.shards[shard])

    def select(self, numbers: np.ndarray) -> "Index":
        """The same split with these images (k,) alone, in that order."""
        rows = {name: getattr(self, name)[numbers] for name in ARRAYS if not name.startswith("key_")}
        starts = np.concatenate([[0], self.key_ends])[numbers]
        lengths = self.key_ends[numbers] - starts
        ends = np.cumsum(lengths)
        places = np.repeat(starts - (ends - lengths), lengths) + np.arange(lengths.sum())
        return replace(self, **rows, key_bytes=self.key_bytes[places], key_ends=ends)

    def key_hashes(self) -> np.ndarray:
        """CRC-32 of each key (n,), uint64: what draws by key start from."""
        keys, ends = self.key_bytes.tobytes(), self.key_ends.tolist()
        return np.array([zlib.crc32(keys[start:end]) for start, end in zip([0, *ends], ends, strict=False)], np.uint64)

    def key(self, i: int) -> str:
        start = self.key_ends[i - 1] if i else 0
        return self.key_bytes[start : self.key_ends[i]].tobytes().decode("utf-8", "surrogateescape")


ARRAYS = {  # their types in the file and in memory
    "shard": "int32",
    "offset": "int64",
    "size": "int64",
    "height": "int32",
    "width": "int32",
    "label": "int32",
    "crc32": "uint32",
    "damaged": "bool",
    "key_bytes": "uint8",
    "key_ends": "int64",
}
CHECKSUM = "crc32"  # beside the facts, of them and all arrays
FACTS = ("shards", "shard_bytes", "classes", "mode", "labels")
# What foreign files cause.
NO_INDEX = (
    SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError,
)  # fmt: skip


def write_index(index: Index) -> Path:
    facts = {name: getattr(index, name) for name in FACTS} | {"shards": tuple(map(kept_url, index.shards))}
    private = index.folder / (index.split + PRIVATE)
    if facts["shards"] == index.shards:
        private.unlink(missing_ok=True)
    else:
        write_atomically(private, encoded({"shards": index.shards}), private=True)
    path = index.folder / (index.split + SUFFIX)
    arrays = {name: np.ascontiguousarray(getattr(index, name)) for name in ARRAYS}
    write_atomically(path, save(arrays, {"mpp": jsons.text(facts | {CHECKSUM: _checksum(facts, arrays)})}))
    return path


def _checksum(facts: dict[str, Any], arrays: dict[str, np.ndarray]) -> int:
    """CRC-32 of what an index says, so that a flipped bit gives no image another label or place."""
    checksum = zlib.crc32(jsons.text([facts[name] for name in FACTS]).encode())
    for name in ARRAYS:
        checksum = zlib.crc32(arrays[name], checksum)
    return checksum


def _with_secrets(index: Index) -> Index:
    """The index with the whole URLs of its shards, where they are kept beside it and are still of these addresses."""
    try:
        whole = tuple(budget.json_file(index.folder / (index.split + PRIVATE))["shards"])
        return replace(index, shards=whole) if tuple(map(kept_url, whole)) == index.shards else index
    except NO_INDEX:
        return index


def refuse_url(folder: str | Path) -> None:
    """Raises ShardError where a local folder is needed."""
    if is_url(str(folder)):
        raise ShardError(
            f"{shown_url(str(folder))}: a URL, which training reads, but nothing else; copy them to a folder first"
        )


def splits(folder: str | Path) -> list[str]:
    """The splits that have an index in `folder`."""
    return sorted(path.name.removesuffix(SUFFIX) for path in Path(folder).glob("*" + SUFFIX))


def read_index(folder: str | Path, split: str, allow: Sequence[str] = ()) -> Index:
    """The index of a split, after a look at every local tar's size; ShardError says what is missing and what to do.

    folder: also the URL of a folder, in which the index lies beside its tars. allow: "pipe" for shards that are the
        output of commands.
    """
    if is_url(str(folder)):
        return _remote_index(str(folder).rstrip("/"), split, allow)
    try:
        return _local_index(Path(folder), split, allow)
    except OSError as error:
        raise ShardError(f"{shown(error.filename or folder)}: cannot be read: {cause(error)}") from None


def _local_index(folder: Path, split: str, allow: Sequence[str]) -> Index:
    path, again = folder / (split + SUFFIX), f"run `mpp shards index {folder}`"
    if not path.is_file() or (folder / UNFINISHED).is_file():
        raise no_index(folder, split)
    refuse_unreadable(path)
    try:
        index = loaded(path, split)
    except NO_INDEX as error:
        raise ShardError(f"{path}: cut, or no index of mpp ({cause(error)}); {again}") from None
    index = _with_secrets(index)
    _check_names(index, str(path), allow)
    for name, size in zip(index.shards, index.shard_bytes, strict=True):
        if is_url(name):
            continue  # its size is compared when it is fetched
        try:
            facts = os.stat(folder / name)
        except FileNotFoundError:
            facts = None
        if facts is None or not stat.S_ISREG(facts.st_mode):
            raise ShardError(f"{folder / name}: missing, though the index names it; restore it or {again}")
        if (found := facts.st_size) != size:
            raise ShardError(
                f"{folder / name}: {found} bytes, the index says {size}; cut or changed? restore it or {again}"
            )
    return index


def _remote_index(url: str, split: str, allow: Sequence[str]) -> Index:
    check_url(url, allow)
    file_url = below(url, split + SUFFIX)
    place = shown_url(file_url)
    with tempfile.NamedTemporaryFile(suffix=SUFFIX) as file:
        file.write(read_small(file_url, MOST_BYTES))
        file.flush()
        try:
            index = loaded(Path(file.name), split)
        except NO_INDEX as error:
            raise ShardError(f"{place}: cut, or no index of mpp ({cause(error)})") from None
    _check_names(index, place, allow)
    shards = tuple(name if is_url(name) else below(url, name) for name in index.shards)
    return replace(index, shards=shards, url=url)


def _check_names(index: Index, place: str, allow: Sequence[str]) -> None:
    """Refuses names that lead out of the index's folder: an index may come from anybody."""
    for name in index.shards:
        if is_url(name):
            check_url(name, allow)
        elif name in ("", "..") or name != Path(name).name or not name.isprintable() or len(name.encode()) > 255:
            raise ShardError(f"{place}: names the shard {shown(name)}; expected a file of its folder, or a URL")


def loaded(path: Path, split: str) -> Index:
    """An index that agrees with itself; whether it does with its tars is another question."""
    budget.check_safetensors(path)
    with safe_open(path, framework="np") as file:
        facts = budget.json_of((file.metadata() or {})["mpp"])
        arrays = {name: file.get_tensor(name) for name in ARRAYS}
    if CHECKSUM in facts and facts[CHECKSUM] != _checksum(facts, arrays):  # earlier versions wrote none
        raise ValueError("its checksum is of something else")
    shards, sizes, classes = (tuple(facts[name]) for name in ("shards", "shard_bytes", "classes"))
    labels = facts.get("labels", "cls")
    index = Index(path.parent, split, shards, sizes, classes, facts["mode"], **arrays, labels=labels)
    if index.mode not in ("RGB", "L") or len(shards) != len(sizes):
        raise ValueError("its parts do not fit together")
    if not all(isinstance(name, str) for name in (*shards, *classes, labels)):
        raise ValueError("its shards and classes are not all named by texts")
    "\0".join(classes).encode("utf-8", "surrogateescape")  # a ValueError for halves of characters
    if not all(type(size) is int and 0 <= size < 2**63 for size in sizes):
        raise ValueError("its shards have impossible sizes")
    _check_arrays(index)
    return index


def _check_arrays(index: Index) -> None:
    """Raises ValueError, or IndexError for a shard beyond the last, unless rows and keys can be what they should be."""
    for name, kind in ARRAYS.items():
        if getattr(index, name).dtype != kind or getattr(index, name).ndim != 1:
            raise ValueError(f"its array {name} is none of {kind}")
    if {len(getattr(index, name)) for name in ARRAYS if name != "key_bytes"} != {len(index)}:
        raise ValueError("its parts do not fit together")
    ends = np.array(index.shard_bytes, np.int64)[index.shard]
    outside = (index.shard < 0) | (index.offset < 0) | (index.size < 0) | (index.offset > ends - index.size)
    if outside.any():
        raise ValueError("its images lie outside its shards")
    h, w = index.height.astype(np.int64), index.width.astype(np.int64)
    if ((h < 0) | (w < 0) | (h * w > MAX_PIXELS) | ((h * w == 0) & ~index.damaged)).any():
        raise ValueError("its images have impossible sizes")
    if ((index.label < -1) | (index.label >= len(index.classes))).any():
        raise ValueError("its labels are of more classes than it names")
    if (np.diff(index.key_ends, prepend=0, append=len(index.key_bytes)) < 0).any():
        raise ValueError("its keys lie outside its texts")


def merged(indexes: Sequence[Index]) -> Index:
    """Several splits as one, the images of each behind those of the one before.

    Labels stay if they mean the same in all; else there are none. Raises ShardError if some are grey and some not.
    """
    first = indexes[0]
    if len(indexes) == 1:
        return first
    if len({index.mode for index in indexes}) > 1:
        kinds = ", ".join(f"{index.origin} {index.mode}" for index in indexes)
        raise ShardError(f"data sets of grey (L) and coloured (RGB) images cannot be mixed, found {kinds}")
    rows = {name: np.concatenate([getattr(index, name) for index in indexes]) for name in ARRAYS}
    counts = [len(index) for index in indexes]
    shards = [len(index.shards) for index in indexes]
    keys = [len(index.key_bytes) for index in indexes]
    rows["shard"] = rows["shard"] + np.repeat(np.cumsum([0, *shards[:-1]]), counts).astype(np.int32)
    rows["key_ends"] = rows["key_ends"] + np.repeat(np.cumsum([0, *keys[:-1]]), counts)
    alike = all(index.classes == first.classes for index in indexes)
    if not alike:
        rows["label"] = np.full(sum(counts), -1, np.int32)
    return Index(
        folder=Path(),  # their shards are paths of their own
        split=first.split,
        mode=first.mode,
        labels=first.labels,
        shards=tuple(index.place(shard) for index in indexes for shard in range(len(index.shards))),
        shard_bytes=tuple(size for index in indexes for size in index.shard_bytes),
        classes=first.classes if alike else (),
        url=" + ".join(dict.fromkeys(index.origin for index in indexes)),  # for messages
        **rows,
    )


def no_index(folder: Path, split: str) -> ShardError:
    """The error that says why a folder has no index of a split, and what to do."""
    try:
        os.listdir(folder) if folder.is_dir() else None
    except OSError as error:  # globbing would find nothing there, and say nothing
        return ShardError(f"{folder}: cannot be read: {cause(error)}")
    if not folder.is_dir():
        if folder.exists():
            return ShardError(f"{folder}: a file, not a folder of shards")
        return ShardError(f"{folder}: no such folder; make it with `mpp shards make SOURCE {folder}`")
    if (folder / UNFINISHED).is_file():
        return ShardError(f"{folder}: an unfinished `mpp shards make`; run it again to go on")
    if (present := splits(folder)) and split not in present:
        return ShardError(f"{folder}: no split {split!r}; it holds {', '.join(map(shown, present))}")
    if any(folder.glob("*.tar")):
        return ShardError(f"{folder}: tars without an index; run `mpp shards index {folder}`")
    return ShardError(f"{folder}: no shards (*.tar) here; make them with `mpp shards make SOURCE {folder}`")
