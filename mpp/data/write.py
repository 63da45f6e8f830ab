"""Images of any source to WebDataset shards with an index: `mpp shards make SOURCE OUT`.

Every source is seen as a list of path names and a way to read one of them; splits and classes come from the names.
Images are written in an order fixed by a hash of their names, so that each shard is mixed. The result is the same
byte for byte however often it was interrupted: finished shards are recorded in a plan that stands in OUT.
"""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import mmap
import os
import shutil
import tarfile
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image
from tqdm import tqdm

from mpp.data.decode import DamagedImage, decode
from mpp.data.index import (
    IMAGE_ENDINGS,
    UNFINISHED,
    Index,
    ShardError,
    build_index,
    read_index,
    scan_shard,
    shown,
    walk_tar,
    write_atomically,
    write_index,
)

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
STORED = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp"}  # by their first bytes: endings may lie
UNPACK: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"\xfd7": lzma.open, b"BZ": bz2.open}
FINISHED = "make.json"  # what UNFINISHED becomes
EXPECTED = "expected a folder, .zip or .tar(.gz, .xz, .bz2) of images, a torchvision dataset, or digits"
READ_ERRORS = (OSError, EOFError, RuntimeError, NotImplementedError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)
CHUNK = 16  # images of one task: few enough for photographs, many enough for 32x32
EDGE = 2**20  # bytes at both ends of an archive that tell it from another of the same size


@dataclass(frozen=True)
class Options:
    """What decides the bytes of the shards."""

    labels: Literal["auto", "none"]
    size: int | None  # pixels, of the shorter side; smaller images stay
    format: Literal["jpg", "png", "webp"] | None  # None: as it is, or png where that is no jpg, png or webp
    quality: int  # 1 to 100, of jpg and webp
    mode: Literal["RGB", "L"]
    per_shard: int  # images
    shard_mib: int

    def __post_init__(self) -> None:
        choices = {"labels": ("auto", "none"), "format": (None, "jpg", "png", "webp"), "mode": ("RGB", "L")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ShardError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if not 1 <= self.quality <= 100:
            raise ShardError(f"quality must be in 1..100, got {self.quality}")
        for name in ("size", "per_shard", "shard_mib"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ShardError(f"{name} must be at least 1, got {value}")


class Files(NamedTuple):
    """A source as path names and a way to read the i-th."""

    names: list[str]
    read: Callable[[int], bytes]


class Picture(NamedTuple):
    """An image of the source and what its path says."""

    number: int  # in Files.names
    name: str
    split: str
    label: str | None  # the name of its class


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
    plan = _open_plan(out, source, options)
    if plan["complete"]:
        report(f"{out}: already complete")
        return [read_index(out, split) for split in plan["done"]]
    with _files(source, out) as files:
        pictures, classes = _understand(str(source), files.names, options, report)
        splits = sorted({picture.split for picture in pictures})
        _save_plan(out, plan)  # before the first shard, so that a rerun knows whose shards these are
        for split in splits:
            inside = [picture for picture in pictures if picture.split == split]
            inside.sort(key=lambda picture: (hashlib.blake2b(_utf8(picture.name)).digest(), picture.name))
            writer = _SplitWriter(out, split, classes, options, plan)
            prepared = _prepared(inside[writer.position :], files, options, workers or os.cpu_count() or 1)
            writer.write(inside, prepared, progress)
    return _finish(out, plan, classes, options, report)


def _finish(
    out: Path, plan: dict[str, Any], classes: Sequence[str], options: Options, report: Callable[[str], None]
) -> list[Index]:
    """Says what was left out and writes the indexes: only now do the shards pass for complete."""
    left_out = [bad for shards in plan["done"].values() for shard in shards for bad in shard["bad"]]
    for name, cause in left_out:
        report(f"left out: {shown(name)}: {cause}")
    if left_out:
        report(f"left out: {len(left_out)} images that cannot be decoded")
    numbers = {str(label): label for label in range(len(classes))}
    indexes = []
    for split, shards in plan["done"].items():
        scans = [scan_shard(out / shard["file"]) for shard in shards]
        indexes.append(build_index(out, split, scans, classes, numbers, options.mode, report))
    for index in indexes:
        write_index(index)
    plan["complete"] = True
    write_atomically(out / FINISHED, json.dumps(plan).encode())
    (out / UNFINISHED).unlink()
    return indexes


# --- the plan ------------------------------------------------------------------------------------------------------


def _open_plan(out: Path, source: str | Path, options: Options) -> dict[str, Any]:
    """The plan of an earlier run of the same command, less the shards that are gone, or a new one.

    plan["done"][split] lists the finished shards: file, bytes, images (up to its end), next (position in the order
    of the split) and bad (images left out, with their causes).
    """
    seen = _fingerprint(Path(source), out)
    fresh: dict[str, Any] = {"source": seen, "options": asdict(options), "done": {}, "complete": False}
    found = next((out / name for name in (UNFINISHED, FINISHED) if (out / name).is_file()), None)
    if found is None:
        if any(out.glob("*.tar")):
            raise ShardError(f"{out}: holds tars that this command did not make; choose another OUT")
        return fresh
    try:
        plan = json.loads(found.read_bytes())
        old = {"source": plan["source"], **plan["options"]}
        done, complete = plan["done"], plan["complete"]
    except (ValueError, LookupError, TypeError):
        raise ShardError(f"{found}: cut or changed; delete {out} to start over") from None
    new = {"source": seen, **asdict(options)}
    changed = [f"{name} {old.get(name)!r}, now {value!r}" for name, value in new.items() if old.get(name) != value]
    if changed:
        raise ShardError(f"{out}: was begun with {'; '.join(changed)}; choose another OUT, or delete it to start over")
    for split, shards in done.items():
        present = [_size(out / shard["file"]) == shard["bytes"] for shard in shards]
        if not all(present):
            done[split], complete = shards[: present.index(False)], False
    return fresh | {"done": done, "complete": complete}


def _save_plan(out: Path, plan: dict[str, Any]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ShardError(f"{out}: cannot be made: {error.strerror or error}") from None
    write_atomically(out / UNFINISHED, json.dumps(plan).encode())


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _fingerprint(source: Path, out: Path) -> str:
    """Tells whether a rerun sees the same source: all names and sizes of a folder, size and both ends of an archive."""
    if source.is_dir():
        listing = [(name, _size(source / name)) for name in _walk(source, out) if _is_image(name)]
        return f"{len(listing)} images, {zlib.crc32(repr(listing).encode()):08x}"
    if not source.is_file():
        return str(source)
    try:
        with open(source, "rb") as file:
            head, size = file.read(EDGE), file.seek(0, os.SEEK_END)
            file.seek(max(0, size - EDGE))
            return f"{size} bytes, {zlib.crc32(head + file.read()):08x}"
    except OSError as error:
        raise ShardError(f"{source}: cannot be read: {error.strerror or error}") from None


# --- sources -------------------------------------------------------------------------------------------------------


@contextmanager
def _files(source: str | Path, out: Path) -> Iterator[Files]:
    """Opens a source; compressed tars are unpacked once into OUT, so that their members can be read in any order."""
    path = Path(source)
    with ExitStack() as stack:
        if path.is_dir():
            names = _walk(path, out)
            yield Files(names, lambda i: (path / names[i]).read_bytes())
        elif path.is_file() and zipfile.is_zipfile(path):
            archive = stack.enter_context(zipfile.ZipFile(path))
            members = [member for member in archive.infolist() if not member.is_dir()]
            yield Files([member.filename.replace("\\", "/") for member in members], lambda i: archive.read(members[i]))
        elif path.is_file():
            file = stack.enter_context(open(_unpacked(path, out, stack), "rb"))
            if os.fstat(file.fileno()).st_size < tarfile.BLOCKSIZE:
                raise ShardError(f"{path}: no archive; {EXPECTED}")
            tar = stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            places = list(walk_tar(tar, path))
            names = [name.decode("utf-8", "surrogateescape") for name, _, _ in places]
            yield Files(names, lambda i: tar[places[i][1] : places[i][1] + places[i][2]])
        elif str(source) == "digits":
            yield _digits()
        elif (name := str(source).removeprefix("torchvision:")).isidentifier():
            yield _torchvision(name, out.resolve().parent / "torchvision")
        else:
            raise ShardError(f"{source}: not found; {EXPECTED}")


def _walk(root: Path, out: Path) -> list[str]:
    """All files below a folder, through links to folders too, but never into OUT or round a loop of links."""

    def refuse(error: OSError) -> None:
        raise ShardError(f"{error.filename}: cannot be read: {error.strerror}") from None

    names, above = [], {str(root): {os.path.realpath(out)}}  # the real folders that lead to each folder
    for folder, inside, files in os.walk(root, onerror=refuse, followlinks=True):
        real, leading = os.path.realpath(folder), above.pop(folder)
        if real in leading:
            inside.clear()
            continue
        inside.sort()
        above |= {os.path.join(folder, name): leading | {real} for name in inside}
        prefix = Path(folder).relative_to(root).as_posix()
        names += [name if prefix == "." else f"{prefix}/{name}" for name in sorted(files)]
    return names


def _unpacked(path: Path, out: Path, stack: ExitStack) -> Path:
    """The plain tar of an archive: itself, or a copy in OUT that `stack` deletes."""
    with open(path, "rb") as file:
        start = file.read(2)
    if start == b"PK":
        raise ShardError(f"{path}: a zip archive that is cut or damaged")
    if (unpack := UNPACK.get(start)) is None:
        return path
    plain = out / "source.tar.part"
    stack.callback(plain.unlink, missing_ok=True)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with unpack(path) as packed, open(plain, "wb") as file:
            shutil.copyfileobj(packed, file, EDGE)
    except READ_ERRORS as error:
        raise ShardError(f"{path}: cannot be unpacked to {plain}: {error}") from None
    return plain


def _digits() -> Files:
    """scikit-learn's 1797 handwritten digits, 8x8 in 17 greys; every fifth of each class is the test split."""
    from sklearn.datasets import load_digits

    data, names = load_digits(), []
    seen: Counter[int] = Counter()
    for number, label in enumerate(data.target.tolist()):
        seen[label] += 1
        names.append(f"{'test' if seen[label] % 5 == 0 else 'train'}/{label}/{number:04d}.png")
    grey = np.round(data.images * (255 / 16)).astype(np.uint8)  # (n, 8, 8)
    return Files(names, lambda i: _encode(grey[i, :, :, None], "png", 100))


def _torchvision(name: str, root: Path) -> Files:
    """A dataset of torchvision by name, downloaded to `root` where the network allows; images become png."""
    import inspect

    from torchvision import datasets

    kind: Any = getattr(datasets, name, None)
    if not isinstance(kind, type):
        raise ShardError(f"{name}: not found, and no dataset of torchvision; {EXPECTED}")
    known = inspect.signature(kind).parameters
    parts: dict[str, dict[str, Any]] = {"train": {}}
    if "train" in known:
        parts = {"train": {"train": True}, "test": {"train": False}}
    elif "split" in known:
        parts = {split: {"split": split} for split in ("train", "val", "test")}
    files: list[tuple[Any, int]] = []
    names = []
    for split, arguments in parts.items():
        try:
            data: Any = kind(str(root), **arguments, **({"download": True} if "download" in known else {}))
        except ValueError:
            continue  # a split that this dataset does not have
        except (OSError, RuntimeError, TypeError) as error:
            raise ShardError(_how_to_get(kind, root, error)) from None
        labels = [int(label) for label in (data.targets if hasattr(data, "targets") else (label for _, label in data))]
        classes = getattr(data, "classes", None) or [str(label) for label in range(max(labels) + 1)]
        names += [f"{split}/{str(classes[label]).replace('/', ' ')}/{i:06d}.png" for i, label in enumerate(labels)]
        files += [(data, i) for i in range(len(data))]

    def read(number: int) -> bytes:
        data, i = files[number]
        data[i][0].save(png := io.BytesIO(), "PNG")
        return png.getvalue()

    return Files(names, read)


def _how_to_get(kind: Any, root: Path, error: BaseException) -> str:
    """Which file to put where, as far as torchvision's class says it."""
    resources = [file for file, _ in getattr(kind, "resources", [])]  # MNIST and its kin
    wanted = getattr(kind, "filename", "") or " and ".join(resources) or "its files"
    url = getattr(kind, "url", "") or next(iter(getattr(kind, "mirrors", [])), "")
    place = root / kind.__name__ / "raw" if resources else root
    message = f"torchvision:{kind.__name__} cannot be loaded ({' '.join(str(error).split())})"
    return f"{message}; put {wanted}{f' (from {url})' if url else ''} into {place} and run again"


# --- what the names mean -------------------------------------------------------------------------------------------


def _utf8(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _is_image(name: str) -> bool:
    """By its ending, in any case of letters."""
    return "." in name and name.rpartition(".")[2].lower() in IMAGE_ENDINGS and not _is_junk(name)


def _is_junk(name: str) -> bool:
    """macOS's shadow files, of which many have image endings."""
    *folders, base = name.split("/")
    return base.startswith("._") or base == ".DS_Store" or "__MACOSX" in folders


def _understand(
    source: str, names: Sequence[str], options: Options, report: Callable[[str], None]
) -> tuple[list[Picture], list[str]]:
    """The images with their splits and classes, and all class names; says what it understood."""
    images = [number for number, name in enumerate(names) if _is_image(name)]
    if not images:
        raise ShardError(f"{source}: no images found among {len(names)} files; {EXPECTED}")
    paths = [[part for part in names[number].split("/") if part not in ("", ".", "..")] for number in images]
    while len({path[0].lower() for path in paths}) == 1 and paths[0][0].lower() not in SPLITS:
        if min(map(len, paths)) == 1:
            break
        paths = [path[1:] for path in paths]  # one folder around everything, as archives often have
    level = any(len(path) > 1 and path[0].lower() in SPLITS for path in paths)
    pictures, outside = [], []
    for number, path in zip(images, paths, strict=True):
        split = SPLITS.get(path[0].lower()) if level and len(path) > 1 else None
        if level and split is None:
            outside.append(names[number])
            continue
        label = path[level] if options.labels == "auto" and len(path) > level + 1 else None
        pictures.append(Picture(number, names[number], split or "train", label))
    classes = list({picture.label for picture in pictures if picture.label is not None})
    classes.sort(key=(lambda name: (int(name), name)) if all(name.isdecimal() for name in classes) else None)
    others = [name for name in names if not _is_image(name) and not _is_junk(name)]
    _describe(source, pictures, classes, outside, others, options, report)
    return pictures, classes


def _describe(
    source: str,
    pictures: Sequence[Picture],
    classes: Sequence[str],
    outside: Sequence[str],
    others: Sequence[str],
    options: Options,
    report: Callable[[str], None],
) -> None:
    counts = Counter(picture.split for picture in pictures)
    report(f"{source}: {len(pictures)} images; " + ", ".join(f"{split} {counts[split]}" for split in sorted(counts)))
    if classes:
        first = ", ".join(map(shown, classes[:5])) + ", ..." * (len(classes) > 5)
        report(f"labels: {len(classes)} classes, named by folders: {first}")
        unlabelled = sum(picture.label is None for picture in pictures)
        if unlabelled:
            report(f"labels: {unlabelled} images lie in no class folder and get none")
        seen = {split: {picture.label or "" for picture in pictures if picture.split == split} for split in counts}
        for split, labels in seen.items():
            if strange := sorted(labels - seen.get("train", labels) - {""}):
                report(f"labels: {split} has {len(strange)} classes that train lacks, such as {shown(strange[0])}")
    else:
        report("labels: none")
    for left, why in ((outside, "images outside train, val and test"), (others, "files that are no images")):
        if left:
            report(f"left out: {len(left)} {why}, such as {shown(left[0])}")
    kind = f"as {options.format}" if options.format else "in their own format (png where that is not jpg, png or webp)"
    limit = f", shorter side at most {options.size} pixels" if options.size else ""
    shard = f"{options.per_shard} images or {options.shard_mib} MiB"
    report(f"writing: {options.mode} images {kind}{limit}, about {shard} a shard")


# --- images --------------------------------------------------------------------------------------------------------


class Prepared(NamedTuple):
    """An image as it goes into the shard, or the cause why it does not."""

    picture: Picture
    cause: str
    ending: str = ""
    data: bytes = b""
    height: int = 0
    width: int = 0


def _prepared(pictures: Sequence[Picture], files: Files, options: Options, workers: int) -> Iterator[Prepared]:
    """The pictures in their order, read, decoded and where needed encoded by threads a few chunks ahead."""

    def prepare(start: int) -> list[Prepared]:
        return [_prepare(picture, files, options) for picture in pictures[start : start + CHUNK]]

    waiting: deque[Future[list[Prepared]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(pictures), CHUNK):
            waiting.append(pool.submit(prepare, start))
            if len(waiting) > 2 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def _prepare(picture: Picture, files: Files, options: Options) -> Prepared:
    """Decodes every image, if only to prove that it is good; its bytes are kept where nothing has to change."""
    try:
        data = files.read(picture.number)
        image = decode(data, options.mode)  # (h, w, c)
        kind = STORED.get(data[:2])
        ending = options.format or kind or "png"
        shorter = min(image.shape[:2])
        if options.size and shorter > options.size:
            h, w = (max(1, round(side * options.size / shorter)) for side in image.shape[:2])
            image = np.asarray(_pillow(image).resize((w, h), Image.Resampling.BICUBIC)).reshape(h, w, -1)
        elif kind == ending and options.mode == "RGB":
            return Prepared(picture, "", ending, data, *image.shape[:2])
        return Prepared(picture, "", ending, _encode(image, ending, options.quality), *image.shape[:2])
    except DamagedImage as error:
        return Prepared(picture, str(error))
    except READ_ERRORS as error:
        return Prepared(picture, f"cannot be read: {' '.join(str(error).split())}")


def _pillow(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def _encode(image: np.ndarray, ending: str, quality: int) -> bytes:
    """jpg keeps colours at full resolution, because they are what is predicted."""
    try:
        if ending == "jpg":
            colours = ("GRAY", "Gray") if image.shape[2] == 1 else ("RGB", "444")
            return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, *colours)
        _pillow(image).save(encoded := io.BytesIO(), {"png": "PNG", "webp": "WEBP"}[ending], quality=quality)
        return encoded.getvalue()
    except ValueError as error:
        raise DamagedImage(f"cannot be stored as {ending}: {error}") from None


# --- tars ----------------------------------------------------------------------------------------------------------


class _SplitWriter:
    """Writes the shards of one split from where the plan says it stopped."""

    def __init__(self, out: Path, split: str, classes: Sequence[str], options: Options, plan: dict[str, Any]) -> None:
        self.out, self.split, self.options, self.plan = out, split, options, plan
        self.labels = {name: label for label, name in enumerate(classes)}
        self.done = plan["done"].setdefault(split, [])
        self.position = self.done[-1]["next"] if self.done else 0  # in the order of the split
        self.images = self.done[-1]["images"] if self.done else 0  # written so far; the next key

    def write(self, pictures: Sequence[Picture], prepared: Iterator[Prepared], progress: bool) -> None:
        total, start = len(pictures), self.position
        with tqdm(desc=self.split, total=total, initial=start, unit="image", disable=not progress) as bar:
            while self.position < len(pictures):
                name = f"{self.split}-{len(self.done):06d}.tar"
                try:
                    self._write_shard(name, prepared, bar)
                except OSError as error:
                    (self.out / (name + ".part")).unlink(missing_ok=True)
                    message = f"{self.out / name}: cannot be written: {error.strerror or error}; run again to go on"
                    raise ShardError(message) from None
        if not self.done:
            raise ShardError(f"none of the {len(pictures)} images of {self.split} can be decoded")

    def _write_shard(self, name: str, prepared: Iterator[Prepared], bar: tqdm) -> None:
        """One tar, complete or absent under its name, and then its line in the plan."""
        part, first, bad = self.out / (name + ".part"), self.images, []
        with open(part, "wb") as tar:
            for image in prepared:
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
            size = (self.out / name).stat().st_size
            self.done.append({"file": name, "bytes": size, "images": self.images, "next": self.position, "bad": bad})
        else:  # nothing but damaged images was left
            part.unlink()
            if self.done:
                self.done[-1]["next"] = self.position
                self.done[-1]["bad"] += bad
        _save_plan(self.out, self.plan)

    def _members(self, image: Prepared) -> bytes:
        key, label = f"{self.images:08d}", image.picture.label
        facts = {"source": image.picture.name, "class": label, "width": image.width, "height": image.height}
        members = {image.ending: image.data, "json": json.dumps(facts).encode()}
        if label is not None:
            members["cls"] = str(self.labels[label]).encode()
        return b"".join(_member(f"{key}.{ending}", data) for ending, data in members.items())


def _member(name: str, data: bytes) -> bytes:
    """A file of a ustar archive with no owner and no time, so that equal images give equal tars."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)
