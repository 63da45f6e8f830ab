"""What `mpp shards make` reads: any source as a list of path names, and what the names mean.

A source is a folder, an archive, a torchvision dataset or scikit-learn's digits. Splits and classes come from the
names alone, whatever the source; nothing is ever written under a name that a source gives.
"""

import bz2
import gzip
import inspect
import io
import lzma
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from mpp import budget
from mpp.errors import cause, shown
from mpp.shards.classes import look_alikes_line
from mpp.shards.tar import BLOCK, IMAGE_ENDINGS, LARGEST_IMAGE, Bytes, ShardError, is_header, walk_tar

T = TypeVar("T")

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
UNPACK: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"\xfd7": lzma.open, b"BZ": bz2.open}
EXPECTED = "expected a folder, .zip or .tar(.gz, .xz, .bz2) of images, a torchvision dataset, or digits"
READ_ERRORS = (
    OSError, EOFError, RuntimeError, NotImplementedError, MemoryError, zlib.error, lzma.LZMAError, zipfile.BadZipFile,
)  # fmt: skip
EDGE = 2**20  # bytes at both ends of an archive that tell it from another of the same size


class Files(NamedTuple):
    """A source as path names and a way to read the i-th."""

    names: list[str]
    read: Callable[[int], bytes]
    links: Sequence[str] = ()  # in a tar: left out, since what they name may lie anywhere


class Picture(NamedTuple):
    """An image of the source and what its path says."""

    number: int  # in Files.names
    name: str
    split: str
    label: str | None  # the name of its class


@contextmanager
def open_source(source: str | Path, out: Path) -> Iterator[Files]:
    """Opens a source; compressed tars are unpacked once into OUT, so that their members can be read in any order."""
    path = Path(source)
    with ExitStack() as stack:
        if path.is_dir():
            yield _folder(path, out)
        elif path.is_file() and zipfile.is_zipfile(path):
            try:
                archive = stack.enter_context(budget.zip_archive(path))
            except (budget.Overrun, *READ_ERRORS) as error:
                raise ShardError(f"{path}: cannot be read: {cause(error)}") from None
            members = [member for member in archive.infolist() if not member.filename.endswith("/")]
            names = [member.filename.replace("\\", "/") for member in members]
            yield Files(names, lambda i: archive.read(_bounded(members[i], members[i].file_size)))
        elif path.is_file():
            yield _tar(path, out, stack)
        elif path.exists():
            raise ShardError(f"{path}: neither a file nor a folder; {EXPECTED}")
        elif str(source) == "digits":
            yield _digits()
        elif (name := str(source).removeprefix("torchvision:")).isidentifier():
            yield _torchvision(name, out.resolve().parent / "torchvision")
        else:
            raise ShardError(f"{source}: not found; {EXPECTED}")


def fingerprint(source: Path, out: Path) -> str:
    """Tells whether a rerun sees the same source: all names and sizes of a folder, size and both ends of an archive."""
    if source.is_dir():
        listing = [(name, size_of(source / name)) for name in _walk(source, out) if _is_image(name)]
        return f"{len(listing)} images, {zlib.crc32(repr(listing).encode()):08x}"
    if not source.is_file():
        return str(source)
    try:
        with open(source, "rb") as file:
            head, size = file.read(EDGE), file.seek(0, os.SEEK_END)
            file.seek(max(0, size - EDGE))
            return f"{size} bytes, {zlib.crc32(head + file.read()):08x}"
    except OSError as error:
        raise ShardError(f"{source}: cannot be read: {cause(error)}") from None


def size_of(path: Path) -> int:
    """Bytes of a file, -1 if there is none."""
    return path.stat().st_size if path.is_file() else -1


def _folder(root: Path, out: Path) -> Files:
    names = _walk(root, out)

    def read(i: int) -> bytes:
        path = root / names[i]
        if path.exists() and not path.is_file():
            raise OSError("no regular file")  # a pipe, from which reading would wait for ever
        return _bounded(path, path.stat().st_size).read_bytes()

    return Files(names, read)


def _walk(root: Path, out: Path) -> list[str]:
    """All files below a folder, through links to folders too, but never into OUT or round a loop of links."""

    def refuse(error: OSError) -> None:
        raise ShardError(f"{error.filename}: cannot be read: {cause(error)}") from None

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


def _tar(path: Path, out: Path, stack: ExitStack) -> Files:
    try:
        plain = _unpacked(path, out, stack)
        tar = Bytes(plain, path)
        if not is_header(tar.read(0, BLOCK)):
            raise ShardError(f"{path}: no archive; {EXPECTED}")
        members = list(walk_tar(tar))
    except OSError as error:
        raise ShardError(f"{path}: cannot be read: {cause(error)}") from None
    files = [member for member in members if not member.link]
    names = [member.name for member in files]
    links = [member.name for member in members if member.link]
    return Files(names, lambda i: tar.read(files[i].offset, _bounded(files[i].size, files[i].size)), links)


def _bounded(what: T, size: int) -> T:
    """`what`, unless its size says that it would fill the memory: archives can hold much in few bytes."""
    if size > LARGEST_IMAGE:
        raise OSError(f"{size} bytes, more than the limit of {LARGEST_IMAGE}")
    return what


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
        with unpack(path) as packed, open(plain, "wb") as file:
            while piece := packed.read(EDGE):
                file.write(piece)
                budget.hold_expanded(file.tell(), path.stat().st_size)
    except (budget.Overrun, *READ_ERRORS) as error:
        raise ShardError(f"{path}: cannot be unpacked to {plain}: {cause(error)}") from None
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
    return Files(names, lambda i: _png(Image.fromarray(grey[i])))


def _torchvision(name: str, root: Path) -> Files:
    """A dataset of torchvision by name, downloaded to `root` where the network allows; images become png."""
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
        except TypeError as error:
            words = f"needs more than its name ({cause(error)}); give a folder of its images instead"
            raise ShardError(f"torchvision:{name}: {words}") from None
        except (OSError, RuntimeError) as error:
            raise ShardError(_how_to_get(kind, root, error)) from None
        try:
            targets = data.targets if hasattr(data, "targets") else (label for _, label in data)
            labels = [int(label) for label in targets]
        except (ValueError, TypeError, NotImplementedError):
            raise ShardError(f"torchvision:{name}: its labels are no classes; expected one integer an image") from None
        classes = getattr(data, "classes", None) or [str(label) for label in range(max(labels) + 1)]
        names += [f"{split}/{str(classes[label]).replace('/', ' ')}/{i:06d}.png" for i, label in enumerate(labels)]
        files += [(data, i) for i in range(len(labels))]

    def read(number: int) -> bytes:
        data, i = files[number]
        return _png(data[i][0])

    return Files(names, read)


def _how_to_get(kind: Any, root: Path, error: BaseException) -> str:
    """Which file to put where, as far as torchvision's class says it."""
    resources = [file for file, _ in getattr(kind, "resources", [])]  # MNIST and its kin
    wanted = getattr(kind, "filename", "") or " and ".join(resources) or "its files"
    url = getattr(kind, "url", "") or next(iter(getattr(kind, "mirrors", [])), "")
    place = root / kind.__name__ / "raw" if resources else root
    message = f"torchvision:{kind.__name__} cannot be loaded ({cause(error)})"
    return f"{message}; put {wanted}{f' (from {url})' if url else ''} into {place} and run again"


def _png(image: Image.Image) -> bytes:
    image.save(encoded := io.BytesIO(), "PNG")
    return encoded.getvalue()


def _is_image(name: str) -> bool:
    """By its ending, in any case of letters."""
    return "." in name and name.rpartition(".")[2].lower() in IMAGE_ENDINGS and not _is_junk(name)


def _is_junk(name: str) -> bool:
    """macOS's shadow files, of which many have image endings."""
    *folders, base = name.split("/")
    return base.startswith("._") or base == ".DS_Store" or "__MACOSX" in folders


def understand(
    source: str, files: Files, labelled: bool, report: Callable[[str], None]
) -> tuple[list[Picture], list[str]]:
    """The images with their splits and classes, and all class names; says what it understood."""
    numbers = {name: number for number, name in enumerate(files.names) if _is_image(name)}
    images = sorted(numbers.values())  # of equal names in an archive the last, as when it is unpacked
    if not images:
        raise ShardError(f"{source}: no images found among {len(files.names)} files; {EXPECTED}")
    paths = [[part for part in files.names[number].split("/") if part not in ("", ".", "..")] for number in images]
    while len({path[0].lower() for path in paths}) == 1 and paths[0][0].lower() not in SPLITS:
        if min(map(len, paths)) == 1:
            break
        paths = [path[1:] for path in paths]  # one folder around everything, as archives often have
    level = any(len(path) > 1 and path[0].lower() in SPLITS for path in paths)
    pictures, outside = [], []
    for number, path in zip(images, paths, strict=True):
        split = SPLITS.get(path[0].lower()) if level and len(path) > 1 else None
        if level and split is None:
            outside.append(files.names[number])
            continue
        label = path[level] if labelled and len(path) > level + 1 else None
        pictures.append(Picture(number, files.names[number], split or "train", label))
    classes = list({picture.label for picture in pictures if picture.label is not None})
    classes.sort(key=(lambda name: (int(name), name)) if all(name.isdecimal() for name in classes) else None)
    _describe(source, pictures, classes, report)
    others = [name for name in files.names if not _is_image(name) and not _is_junk(name)]
    again = [name for number, name in enumerate(files.names) if numbers.get(name, number) != number]
    links = [name for name in files.links if _is_image(name)]
    for left, why in (
        (outside, "images outside train, val and test"),
        (others, "files that are no images"),
        (again, "images whose names come again further on"),
        (links, "links to images, which an archive may point anywhere"),
    ):
        if left:
            report(f"left out: {len(left)} {why}, such as {shown(left[0])}")
    return pictures, classes


def _describe(source: str, pictures: Sequence[Picture], classes: Sequence[str], report: Callable[[str], None]) -> None:
    counts = Counter(picture.split for picture in pictures)
    in_splits = ", ".join(f"{split} {counts[split]}" for split in sorted(counts))
    report(f"{shown(source)}: {len(pictures)} images; {in_splits}")
    if not classes:
        report("labels: none")
        return
    first = ", ".join(map(shown, classes[:5])) + ", ..." * (len(classes) > 5)
    report(f"labels: {len(classes)} classes, named by folders: {first}")
    if alike := look_alikes_line(classes):
        report(alike)
    if unlabelled := sum(picture.label is None for picture in pictures):
        report(f"labels: {unlabelled} images lie in no class folder and get none")
    seen = {split: {picture.label or "" for picture in pictures if picture.split == split} for split in counts}
    for split, labels in seen.items():
        if strange := sorted(labels - seen.get("train", labels) - {""}):
            report(f"labels: {split} has {len(strange)} classes that train lacks, such as {shown(strange[0])}")
