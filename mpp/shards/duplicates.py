"""Images with the same encoded bytes, within and between splits."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mpp.shards.index import Index
from mpp.shards.pictures import Shards
from mpp.shards.sweep import sweep

LISTED = 1000  # groups that are kept with their keys
DIGEST = 32  # bytes, of blake2b: no two different images share it, even by design


@dataclass(frozen=True)
class Copy:
    """One of several images with the same bytes."""

    split: str
    key: str
    label: str | None  # the name of its class


@dataclass(frozen=True)
class Duplicates:
    """What is there more than once; a group is all images with the same bytes, in any split."""

    groups: int
    disagreeing: int  # groups whose images have different labels
    within: dict[str, int]  # images of a split that it already holds, beyond the first of each
    between: list[tuple[str, str, int]]  # (a, b, images of b that a holds as well)
    listed: list[list[Copy]]  # the first groups: those in several splits first, then those whose labels disagree


def find_duplicates(indexes: Sequence[Index], progress: bool = True) -> Duplicates:
    """Looks for equal checksums and sizes, and then at the bytes themselves.

    Damaged images are left out. Labels are compared as numbers, which must mean the same in all indexes.
    """
    starts = np.cumsum([0, *map(len, indexes)])  # of each split among all images
    places = _suspects(indexes)  # (k,) rising
    digests = np.empty((len(places), DIGEST), np.uint8)
    done = 0
    for number, index in enumerate(indexes):
        inside = places[(places >= starts[number]) & (places < starts[number + 1])] - starts[number]
        for found in sweep(index, inside, _digests, "compare", progress):
            digests[done : done + len(found)] = found
            done += len(found)
    _, group, sizes = np.unique(digests.view(np.uint64), axis=0, return_inverse=True, return_counts=True)
    equal = sizes[group] > 1
    places, group = places[equal], np.unique(group[equal], return_inverse=True)[1]
    return _described(indexes, starts, places, group)


def _suspects(indexes: Sequence[Index]) -> np.ndarray:
    """The places of images that share checksum and size with another one, rising."""
    crc, size, damaged = (
        np.concatenate([getattr(index, name) for index in indexes]) for name in ("crc32", "size", "damaged")
    )
    places = np.flatnonzero(~damaged)
    places = places[np.lexsort([size[places], crc[places]])]
    same = (np.diff(crc[places].astype(np.int64)) == 0) & (np.diff(size[places]) == 0)  # (k - 1,): as the next one
    alike = np.zeros(len(places), np.bool_)
    alike[:-1] |= same
    alike[1:] |= same
    return np.sort(places[alike])


def _digests(shards: Shards, numbers: list[int]) -> np.ndarray:
    joined = b"".join(hashlib.blake2b(shards.read(i), digest_size=DIGEST).digest() for i in numbers)
    return np.frombuffer(joined, np.uint8).reshape(-1, DIGEST)


def _described(indexes: Sequence[Index], starts: np.ndarray, places: np.ndarray, group: np.ndarray) -> Duplicates:
    """Counts over images at `places` (k,), each in a group (k,) numbered from 0."""
    groups = int(group.max()) + 1 if len(group) else 0
    split = np.searchsorted(starts, places, side="right") - 1
    label = np.concatenate([index.label for index in indexes])[places]
    counts = np.zeros((groups, len(indexes)), np.int64)
    np.add.at(counts, (group, split), 1)
    lowest, highest = np.full(groups, 2**31), np.full(groups, -1)
    np.minimum.at(lowest, group[label >= 0], label[label >= 0])
    np.maximum.at(highest, group[label >= 0], label[label >= 0])
    disagree, several = lowest < highest, (counts > 0).sum(1) > 1
    names = [index.split for index in indexes]
    between = []
    for a in range(len(names)):
        for b in range(a + 1, len(names)):
            if images := int(counts[counts[:, a] > 0, b].sum()):
                between.append((names[a], names[b], images))

    def copy(place: int, split: int, label: int) -> Copy:
        index = indexes[split]
        name = index.classes[label] if 0 <= label < len(index.classes) else None
        return Copy(index.split, index.key(place - starts[split]), name)

    first = np.full(groups, starts[-1])
    np.minimum.at(first, group, places)
    rows = np.split(np.argsort(group, kind="stable"), np.cumsum(np.bincount(group))[:-1]) if groups else []
    order = np.lexsort([first, ~disagree, ~several])[:LISTED]
    return Duplicates(
        groups=groups,
        disagreeing=int(disagree.sum()),
        within={name: int(np.maximum(counts[:, number] - 1, 0).sum()) for number, name in enumerate(names)},
        between=between,
        listed=[[copy(int(places[i]), int(split[i]), int(label[i])) for i in rows[g].tolist()] for g in order],
    )
