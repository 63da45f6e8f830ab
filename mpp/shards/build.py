"""`mpp shards index`: an index from tars, whoever wrote them."""

import re
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mpp.errors import counted, shown
from mpp.shards.index import NO_INDEX, SUFFIX, UNFINISHED, Index, loaded, no_index, splits, write_index
from mpp.shards.labels import Classes, classes_of, is_pattern, labeller
from mpp.shards.tar import Sample, Scan, ShardError, scan_shard
from mpp.workers import workers


def index_folder(
    folder: str | Path, split: str | None = None, labels: str | None = None, report: Callable[[str], None] = print
) -> list[Index]:
    """Indexes all tars of a folder; `split` names those that are only numbered (img2dataset's 00000.tar).

    labels: where they come from, see labels.py; as in the index that is there, or else cls. They mean the same in every
        split: classes are collected over all of them.
    """
    folder = Path(folder)
    if split is not None and (not split or "/" in split):
        raise ShardError(f"a split is part of a file name, got {split!r}")
    paths = sorted(folder.glob("*.tar"))
    if not paths and splits(folder):
        raise ShardError(f"{folder}: no tars here; the index that it holds is of others, at URLs or deleted")
    if (folder / UNFINISHED).is_file() or not paths:
        raise no_index(folder, split or "train")
    if odd := [path for path in paths if not path.name.isprintable()]:
        raise ShardError(f"{shown(odd[0])}: a name that cannot be printed; rename it")
    old = {name: index for name in splits(folder) if (index := _old(folder, name))}
    choice = labels or next((index.labels for index in old.values()), "cls")
    if not labels and is_pattern(choice):  # of a stranger it may run without end, and nothing could stop it
        words = "an expression of an index is not run unasked"
        raise ShardError(
            f"{folder}: labels: {words}; give --labels {shown(shlex.quote(choice))} again, or another choice"
        )
    if not labels and choice != "cls":
        report(f"labels: {shown(choice)}, as in the index that was there")
    groups: dict[str, list[Scan]] = {}
    for scan in scan_shards(paths, choice):
        groups.setdefault(split_of(scan.path.name) or split or "train", []).append(scan)
    classes = classes_of([scan for scans in groups.values() for scan in scans], choice, report)
    made = []
    for name, scans in groups.items():
        mode = old[name].mode if name in old else "RGB"
        made.append(build_index(folder, name, scans, classes, mode, report))
    for index in made:  # only when all of them are sound
        write_index(index)
    return made


def split_of(name: str) -> str:
    """The split that the name of a tar tells: what stands before its number."""
    return re.sub(r"[-_.]?\d*$", "", name.removesuffix(".tar"))


def _old(folder: Path, split: str) -> Index | None:
    """The index that is there already, even if it no longer agrees with its tars: it knows its mode and labels."""
    try:
        return loaded(folder / (split + SUFFIX), split)
    except NO_INDEX:
        return None


def scan_shards(paths: Sequence[Path], labels: str, progress: bool = True) -> list[Scan]:
    """Scans tars side by side."""
    scan = partial(scan_shard, label=labeller(labels))
    with workers() as pool:
        return list(tqdm(pool.map(scan, paths), "index", len(paths), unit="shard", disable=not progress))


def build_index(
    folder: Path, split: str, scans: Sequence[Scan], classes: Classes, mode: str, report: Callable[[str], None]
) -> Index:
    """One split's index from its scanned tars."""
    samples = [sample for scan in scans for sample in scan.samples]
    shard = np.repeat(np.arange(len(scans), dtype=np.int32), [len(scan.samples) for scan in scans])
    _refuse_equal_keys(folder, split, scans)
    keys = [sample.key.encode("utf-8", "surrogateescape") for sample in samples]

    def column(name: str, dtype: type) -> np.ndarray:
        return np.array([getattr(sample, name) for sample in samples], dtype)

    index = Index(
        folder=folder,
        split=split,
        shards=tuple(scan.path.name for scan in scans),
        shard_bytes=tuple(scan.bytes for scan in scans),
        classes=classes.names,
        mode=mode,
        shard=shard,
        offset=column("offset", np.int64),
        size=column("size", np.int64),
        height=column("height", np.int32),
        width=column("width", np.int32),
        label=np.array([classes.numbers.get(sample.label, -1) for sample in samples], np.int32),
        crc32=column("crc32", np.uint32),
        damaged=np.array([sample.damage != "" for sample in samples], np.bool_),
        key_bytes=np.frombuffer(b"".join(keys), np.uint8),
        key_ends=np.cumsum([len(key) for key in keys], dtype=np.int64),
        labels=classes.choice,
    )
    _describe(index, scans, samples, report)
    return index


def _refuse_equal_keys(folder: Path, split: str, scans: Sequence[Scan]) -> None:
    keys = [sample.key for scan in scans for sample in scan.samples]
    if len(set(keys)) == len(keys):
        return
    key, times = Counter(keys).most_common(1)[0]
    places = [scan.path.name for scan in scans for sample in scan.samples if sample.key == key]
    where = ", ".join(map(shown, places[:4]))
    raise ShardError(f"{folder}: key {shown(key)} occurs {times} times in {shown(split)}: in {where}")


def _describe(index: Index, scans: Sequence[Scan], samples: Sequence[Sample], report: Callable[[str], None]) -> None:
    """Says what the index holds, and what it leaves out."""
    for i in np.flatnonzero(index.damaged).tolist():
        report(f"{shown(index.shards[index.shard[i]])} {shown(samples[i].key)}: {samples[i].damage}")
    name, damaged = shown(index.split), int(index.damaged.sum())
    held = f"{len(index)} images in {counted(len(scans), 'shard')}, {len(index.classes)} classes"
    report(f"{name}: {held}, {damaged} damaged")
    if index.classes and (without := int((index.label < 0).sum())):
        report(f"{name}: {without} images have no label ({shown(index.labels)})")
    if left_out := sum(scan.without_image for scan in scans):
        report(f"{name}: left out {left_out} samples without an image")
    if links := sum(scan.links for scan in scans):
        report(f"{name}: left out {links} links")
