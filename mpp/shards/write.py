"""Images of any source to WebDataset shards with an index: `mpp shards make SOURCE OUT`.

Images are written in an order fixed by a hash of their names, so that each shard is mixed, and the start of the hash is
an image's key, so that it stays the same when others come or go. The result is the same byte for byte however often
making was interrupted: finished shards are recorded in a plan that stands in OUT.
"""

import hashlib
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tqdm import tqdm

from mpp import budget, jsons
from mpp.errors import cause, shown
from mpp.files import claimed, write_atomically
from mpp.jsons import encoded
from mpp.shards.build import build_index, scan_shards
from mpp.shards.index import UNFINISHED, Index, read_index, write_index
from mpp.shards.labels import Classes
from mpp.shards.prepare import Options, Prepared, prepared
from mpp.shards.sources import fingerprint, open_source, size_of, understand
from mpp.shards.tar import ShardError
from mpp.workers import cores

FINISHED = "make.json"  # what UNFINISHED becomes
KEYS = "16 hex digits of the name's blake2b"  # what keys are made of; plans without it: running numbers
KEY_DIGITS = 16  # hexadecimal; of a million images two get the same key with a chance of 3e-8, and that is refused


class Shard(NamedTuple):
    """A finished shard."""

    file: str
    bytes: int
    images: int  # of the split, up to the end of this shard
    next: int  # position in the order of the split
    bad: list[tuple[str, str]]  # images left out, with their causes


@dataclass(frozen=True)
class Plan:
    """What is being made, and what of it is there: JSON in OUT, under another name once all of it is."""

    source: str  # fingerprint
    options: dict[str, Any]
    done: dict[str, list[Shard]]  # by split
    keys: str = KEYS


def make_shards(
    source: str | Path,
    out: str | Path,
    *,
    labels: Literal["auto", "none"] = "auto",
    size: int | None = None,
    format: Literal["jpg", "png", "webp"] | None = None,
    quality: int = 95,
    mode: Literal["RGB", "L"] = "RGB",
    per_shard: int = 5000,
    shard_mib: int = 256,
    workers: int | None = None,
    report: Callable[[str], None] = print,
    progress: bool = True,
) -> list[Index]:
    """Writes OUT/SPLIT-000000.tar ... and an index a split; goes on where an interrupted run stopped."""
    options, out = Options(labels, size, format, quality, mode, per_shard, shard_mib), Path(out)
    threads = cores() if workers is None else workers
    if threads < 1:
        raise ShardError(f"workers must be at least 1, got {threads}")
    _refuse_as_source(Path(source), out)
    with claimed(out, "another `mpp shards make` is writing there; wait for it"):
        plan = _open_plan(out, Plan(fingerprint(Path(source), out), asdict(options), {}))
        if (out / FINISHED).is_file():
            report(f"{shown(out)}: already complete")
            return [read_index(out, split) for split in plan.done]
        with open_source(source, out) as files:
            pictures, classes = understand(str(source), files, labels == "auto", report)
            report(f"writing: {options}")
            _save_plan(out, plan)  # before the first shard, so that a rerun knows whose shards these are
            for split in sorted({picture.split for picture in pictures}):
                inside = [picture for picture in pictures if picture.split == split]
                inside.sort(key=lambda picture: _hash(picture.name))
                writer = _SplitWriter(out, split, classes, options, plan)
                images = prepared(inside[writer.position :], files, options, threads)
                writer.write(len(inside), images, progress)
        return _finish(out, plan, classes, options, report, progress)


def _refuse_as_source(source: Path, out: Path) -> None:
    """Raises ShardError if OUT is SOURCE, or makes a path of a SOURCE that is a name, such as digits."""
    if out.exists() and source.exists() and out.samefile(source):
        raise ShardError(f"{out}: is the source itself; choose another OUT")
    above = (out.absolute(), *out.absolute().parents)
    if not source.exists() and Path(os.path.abspath(source)) in map(Path, map(os.path.abspath, above)):
        raise ShardError(f"{out}: is the source itself, which is a path as soon as OUT is there; choose another OUT")


def _finish(
    out: Path,
    plan: Plan,
    classes: Sequence[str],
    options: Options,
    report: Callable[[str], None],
    progress: bool,
) -> list[Index]:
    """Says what was left out and writes the indexes: only now do the shards pass for complete."""
    left_out = [bad for shards in plan.done.values() for shard in shards for bad in shard.bad]
    for name, why in left_out:
        report(f"left out: {shown(name)}: {why}")
    if left_out:
        report(f"left out: {len(left_out)} images that cannot be decoded")
    known = Classes("cls", tuple(classes), {str(label): label for label in range(len(classes))})
    indexes = []
    for split, shards in plan.done.items():
        scans = scan_shards([out / shard.file for shard in shards], known.choice, progress)
        indexes.append(build_index(out, split, scans, known, options.mode, report))
    for index in indexes:
        write_index(index)
    _rename(out / UNFINISHED, out / FINISHED)
    return indexes


def _open_plan(out: Path, fresh: Plan) -> Plan:
    """The plan of an earlier run of the same command, less the shards that are gone, or the fresh one."""
    found = next((out / name for name in (UNFINISHED, FINISHED) if (out / name).is_file()), None)
    if found is None:
        if any(out.glob("*.tar")):
            raise ShardError(f"{out}: holds tars that this command did not make; choose another OUT")
        return fresh
    try:
        saved = budget.json_file(found)
        old = {"source": saved["source"], "keys": saved.get("keys", "running numbers"), **saved["options"]}
        done = {split: [Shard(**shard) for shard in shards] for split, shards in saved["done"].items()}
        whole = {split: [size_of(out / shard.file) == shard.bytes for shard in done[split]] for split in done}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise ShardError(f"{found}: cut or changed; delete {out} to start over") from None
    complete = found.name == FINISHED and all(map(all, whole.values()))  # nothing will be written: any keys are right
    new = {"source": fresh.source, "keys": old["keys"] if complete else KEYS, **fresh.options}
    changed = [
        f"{name} {shown(repr(old.get(name)))}, now {value!r}" for name, value in new.items() if old.get(name) != value
    ]
    if changed:
        raise ShardError(f"{out}: was begun with {'; '.join(changed)}; choose another OUT, or delete it to start over")
    for split, there in whole.items():
        if not all(there):
            done[split] = done[split][: there.index(False)]
            if (out / FINISHED).is_file():
                _rename(out / FINISHED, out / UNFINISHED)
    return replace(fresh, done=done)


def _save_plan(out: Path, plan: Plan) -> None:
    done = {split: [shard._asdict() for shard in shards] for split, shards in plan.done.items()}
    write_atomically(out / UNFINISHED, encoded({**asdict(plan), "done": done}))


def _rename(old: Path, new: Path) -> None:
    try:
        os.replace(old, new)
    except OSError as error:
        raise ShardError(f"{new}: cannot be written: {cause(error)}") from None


def _hash(name: str) -> str:
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape")).hexdigest()


class _SplitWriter:
    """Writes the shards of one split from where the plan says it stopped."""

    def __init__(self, out: Path, split: str, classes: Sequence[str], options: Options, plan: Plan) -> None:
        self.out, self.split, self.options, self.plan = out, split, options, plan
        self.labels = {name: label for label, name in enumerate(classes)}
        self.done = plan.done.setdefault(split, [])
        self.position = self.done[-1].next if self.done else 0  # in the order of the split
        self.images = self.done[-1].images if self.done else 0  # written so far

    def write(self, total: int, images: Iterator[Prepared], progress: bool) -> None:
        with tqdm(desc=self.split, total=total, initial=self.position, unit="image", disable=not progress) as bar:
            while self.position < total:
                name = f"{self.split}-{len(self.done):06d}.tar"
                part = self.out / (name + ".part")
                try:
                    self._write_shard(name, part, images, bar)
                except OSError as error:
                    with suppress(OSError):
                        part.unlink()
                    raise ShardError(
                        f"{self.out / name}: cannot be written: {cause(error)}; run again to go on"
                    ) from None
        if not self.done:
            raise ShardError(f"none of the {total} images of {self.split} can be decoded")

    def _write_shard(self, name: str, part: Path, images: Iterator[Prepared], bar: tqdm) -> None:
        """One tar, complete or absent under its name, and then its line in the plan."""
        first, bad = self.images, []
        with open(part, "wb") as tar:
            for image in images:
                self.position += 1
                bar.update()
                if image.cause:
                    bad.append((image.picture.name, image.cause))
                    continue
                tar.write(self._members(image))
                self.images += 1
                if self.images - first == self.options.per_shard or tar.tell() >= self.options.shard_mib * 2**20:
                    break
            tar.write(bytes(2 * tarfile.BLOCKSIZE))  # the end mark
            tar.flush()
            os.fsync(tar.fileno())
        if self.images > first:
            os.replace(part, self.out / name)
            self.done.append(Shard(name, size_of(self.out / name), self.images, self.position, bad))
        else:  # nothing but damaged images was left
            part.unlink()
            if self.done:
                self.done[-1] = self.done[-1]._replace(next=self.position, bad=[*self.done[-1].bad, *bad])
        _save_plan(self.out, self.plan)

    def _members(self, image: Prepared) -> bytes:
        key, label = _hash(image.picture.name)[:KEY_DIGITS], image.picture.label
        facts = {"source": image.picture.name, "class": label, "width": image.width, "height": image.height}
        members = {image.ending: image.data, "json": jsons.text(facts).encode()}
        if label is not None:
            members["cls"] = str(self.labels[label]).encode()
        return b"".join(_member(f"{key}.{ending}", data) for ending, data in members.items())


def _member(name: str, data: bytes) -> bytes:
    """A file of a ustar archive with no owner and no time, so that equal images give equal tars."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)
