"""Parts of a split: a share of each class's labels, and images held out from training.

An image's place in the draw is a hash of its key and the seed, so a part is the same however the shards are cut, and
smaller shares lie within larger ones.
"""

import zlib

import numpy as np

from mpp.data.config import SubsetConfig
from mpp.seeds import mix
from mpp.shards.index import Index, ShardError

SHARE, HELD_OUT, FOR_EVER, SOME = 1, 2, 3, 5  # what a draw is for; mpp.shards.stats has 4


def drawn(index: Index, config: SubsetConfig, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the images to train on, and of those held out, each rising; only images with a label.

    Raises ShardError where no image has one, or nothing could be held out.
    """
    labelled = np.flatnonzero(index.label >= 0)
    if not len(labelled):
        raise ShardError(
            f"{index.origin}: split {index.split} has no labels; training with labels, and data.subset, need some"
        )
    most = config.per_class or len(index)
    chosen = _first(index, labelled, config.share, most, seed, SHARE)
    if not config.hold_out:
        return chosen, chosen[:0]
    held = _first(index, chosen, config.hold_out, len(index), seed, HELD_OUT, leave=1)
    if not len(held):
        raise ShardError(
            f"{index.origin}: split {index.split}: data.subset.hold_out needs a class of at least 2 images, "
            f"found {len(chosen)} images in as many classes"
        )
    return np.setdiff1d(chosen, held), held


def held_out(index: Index, share: float) -> np.ndarray:
    """Which images (n,) a share of the keys holds out, as a function of each key alone.

    Neither the seed nor other images count: an image that is held out once is so for ever, whatever is added.
    """
    return mix(FOR_EVER, index.key_hashes()) < np.uint64(share * 2.0**64)


def some_labelled(index: Index, count: int) -> np.ndarray:
    """So many images with a label, or all there are, as a function of the keys alone: the same ones for every seed.

    Of shards by URL they lie in as few as can be, which are drawn as well: each that is touched is fetched.
    """
    numbers = np.flatnonzero((index.label >= 0) & ~index.damaged)
    if index.remote:
        shards, each = np.unique(index.shard[numbers], return_counts=True)
        order = np.argsort(mix(SOME, shards.astype(np.uint64)), kind="stable")
        enough = 1 + np.searchsorted(np.cumsum(each[order]), count)
        numbers = numbers[np.isin(index.shard[numbers], shards[order[:enough]])]
    order = np.argsort(mix(SOME, index.key_hashes()[numbers]), kind="stable")
    return np.sort(numbers[order[:count]])


def digest(index: Index) -> str:
    """Which images these are, whatever shards they lie in: how many, and a checksum of their keys and contents."""
    return f"{len(index)} images {zlib.crc32(index.crc32.tobytes(), zlib.crc32(index.key_bytes.tobytes())):08x}"


def contents(*indexes: Index) -> str:
    """What tells whether figures are of these images and labels."""
    return "; ".join(f"{digest(index)}, {label_digest(index)}" for index in indexes)


def label_digest(index: Index) -> str:
    """Which label each image has: a checksum of the labels and of the classes' names."""
    names = "\0".join(index.classes).encode("utf-8", "surrogatepass")
    return f"{len(index.classes)} classes {zlib.crc32(index.label.tobytes(), zlib.crc32(names)):08x}"


def _first(
    index: Index, numbers: np.ndarray, share: float, most: int, seed: int, purpose: int, leave: int = 0
) -> np.ndarray:
    """Of each class the share of images, rounded but at least one and at most `most`, whose hashes come first."""
    keys = index.key_hashes()[numbers]
    order = np.lexsort([mix(seed, purpose, keys), index.label[numbers]])  # class by class, each in hashed order
    _, counts = np.unique(index.label[numbers], return_counts=True)
    wanted = np.maximum(1, np.rint(share * counts)).astype(np.int64)
    wanted = np.minimum(np.minimum(wanted, most), counts - leave)
    rank = np.arange(len(numbers)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.sort(numbers[order[rank < np.repeat(wanted, counts)]])
