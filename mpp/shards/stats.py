"""`mpp shards stats`: what is in a folder of shards."""

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from mpp.decode import KINDS, DamagedImage, decode
from mpp.files import write_atomically
from mpp.jsons import encoded
from mpp.seeds import mix
from mpp.shards.classes import relabelled, union
from mpp.shards.duplicates import Duplicates, find_duplicates
from mpp.shards.index import Index, no_index, read_index, refuse_url, splits
from mpp.shards.pictures import Shards
from mpp.shards.sweep import sweep
from mpp.shards.tar import ShardError

FORMATS = {**KINDS, b"II": "TIFF", b"MM": "TIFF"} | {b"P%d" % i: "PNM" for i in range(1, 7)}  # by the first bytes
SAMPLE = 4  # what the draw of images is for; mpp.data.subset has 1 to 3
PERCENT = (0, 5, 50, 95, 100)


@dataclass(frozen=True)
class Spread:
    """Five values that occur, at these percentages of all in rising order."""

    min: float
    p5: float
    median: float
    p95: float
    max: float


@dataclass(frozen=True)
class SplitStats:
    """What one split holds. Colours are of the decoded, upright images as training gets them, in [0, 1]."""

    images: int
    shards: int
    bytes: int  # of the encoded images
    damaged: int  # known to the index, or found among those that were decoded
    height: Spread | None  # pixels, of all images with a whole header; None where there are none
    width: Spread | None
    aspect: Spread | None  # width / height
    bytes_per_image: Spread | None
    decoded: int  # good images that formats and colours are counted over
    sampled: bool  # whether these are a sample
    formats: dict[str, int]
    mean: list[float]  # by channel; empty where nothing could be decoded
    std: list[float]
    images_by_label: list[int]
    without_label: int


@dataclass(frozen=True)
class Stats:
    """What a folder of shards holds; `str` of it is a table (mpp/shards/stats_table.py)."""

    folder: str
    classes: tuple[str, ...]  # by label
    splits: dict[str, SplitStats]  # train first
    duplicates: Duplicates

    def save(self, path: Path) -> None:
        """Writes all of it as JSON."""
        write_atomically(path, encoded(asdict(self), indent=1))


def folder_stats(folder: str | Path, images: int | None = None, seed: int = 0, progress: bool = True) -> Stats:
    """Looks at every split; `images` of each, chosen by a hash of key and seed, are decoded, by default all."""
    if images is not None and images < 1:
        raise ShardError(f"a sample needs at least 1 image, got {images}")
    refuse_url(folder)
    folder = Path(folder)
    names = sorted(splits(folder), key=lambda name: (name != "train", name))
    if not names:
        raise no_index(folder, "train")
    indexes = [read_index(folder, name) for name in names]
    classes = union([index.classes for index in indexes])
    indexes = [relabelled(index, classes) for index in indexes]
    parts = {index.split: _split_stats(index, images, seed, progress) for index in indexes}
    return Stats(str(folder), indexes[0].classes, parts, find_duplicates(indexes, progress))


def _split_stats(index: Index, images: int | None, seed: int, progress: bool) -> SplitStats:
    numbers = _sample(index, images, seed)
    parts = list(sweep(index, numbers, _colours, "decode", progress))  # one for each chunk
    formats = sum((part.formats for part in parts), Counter())
    decoded = formats.total()
    means = sum((part.means for part in parts), np.zeros(index.channels)) / max(decoded, 1)  # (c,)
    squares = sum((part.squares for part in parts), np.zeros(index.channels)) / max(decoded, 1)
    whole = index.height > 0
    height, width = index.height[whole], index.width[whole]
    labels = index.label[index.label >= 0]
    return SplitStats(
        images=len(index),
        shards=len(index.shards),
        bytes=int(index.size.sum()),
        damaged=int(index.damaged.sum()) + len(numbers) - decoded,
        height=_spread(height),
        width=_spread(width),
        aspect=_spread(width / height),
        bytes_per_image=_spread(index.size),
        decoded=decoded,
        sampled=len(numbers) < int((~index.damaged).sum()),
        formats=dict(sorted(formats.items())),
        mean=means.tolist() if decoded else [],
        std=np.sqrt(np.maximum(squares - means**2, 0)).tolist() if decoded else [],
        images_by_label=np.bincount(labels, minlength=len(index.classes)).tolist(),
        without_label=len(index) - len(labels),
    )


def _sample(index: Index, images: int | None, seed: int) -> np.ndarray:
    """The numbers of the images to decode, rising: of the good ones those whose hashes come first."""
    good = np.flatnonzero(~index.damaged)
    if images is None or images >= len(good):
        return good
    return np.sort(good[np.argsort(mix(seed, SAMPLE, index.key_hashes()[good]), kind="stable")[:images]])


class _Colours(NamedTuple):
    """Of some images: how many of each format decode, and sums over them of what each has on average."""

    formats: Counter[str]
    means: np.ndarray  # float64 (c,), of the mean of v over an image's pixels, v in [0, 1]
    squares: np.ndarray  # float64 (c,), of the mean of v squared


def _colours(shards: Shards, numbers: Sequence[int]) -> _Colours:
    """Each image weighs the same, however large: training cuts one crop of one size out of each.

    The mean is that of v over all pixels so weighted, and the variance mean(v ** 2) - mean(v) ** 2 of the same.
    """
    index, formats = shards.index, Counter[str]()
    means, squares = np.zeros((2, index.channels))
    for i in numbers:
        data = shards.read(i)
        try:
            image = decode(data, index.mode)
        except DamagedImage:
            continue
        if zlib.crc32(data) != index.crc32[i]:
            continue  # reading counts it as damaged, too
        mean, std = (figure[:, 0] / 255 for figure in cv2.meanStdDev(image))  # sums of whole numbers inside: exact
        formats[FORMATS.get(data[:2], "other")] += 1
        means += mean
        squares += mean**2 + std**2
    return _Colours(formats, means, squares)


def _spread(values: np.ndarray) -> Spread | None:
    if not len(values):
        return None
    return Spread(*np.percentile(values, PERCENT, method="nearest").tolist())
