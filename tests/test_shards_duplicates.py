"""mpp/shards/duplicates.py against a comparison of every image with every other one."""

import itertools
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from shard_files import png, quiet, write_tar

from mpp.shards.build import index_folder
from mpp.shards.duplicates import LISTED, Copy, Duplicates, find_duplicates
from mpp.shards.index import Index, read_index
from mpp.shards.stats import folder_stats
from mpp.shards.stats_table import table

Images = dict[str, list[tuple[bytes, str]]]  # by split: bytes and label


def indexes(folder: Path, splits: Images) -> list[Index]:
    folder.mkdir(exist_ok=True)
    for split, images in splits.items():
        members = []
        for i, (data, label) in enumerate(images):
            members += [(f"{split}{i}.png", data), *([(f"{split}{i}.cls", label.encode())] if label else [])]
        write_tar(folder / f"{split}-0.tar", members)
    index_folder(folder, report=quiet)
    return [read_index(folder, split) for split in splits]


def slow(splits: Images) -> tuple[int, int, dict[str, int], list[tuple[str, str, int]]]:
    """Groups, groups that disagree, images within each split, images between splits; one by one."""
    groups: dict[bytes, list[tuple[str, str]]] = {}
    for split, images in splits.items():
        for data, label in images:
            groups.setdefault(data, []).append((split, label))
    several = [group for group in groups.values() if len(group) > 1]
    disagree = sum(len({label for _, label in group if label}) > 1 for group in several)
    within = {s: sum(max(sum(other == s for other, _ in group) - 1, 0) for group in several) for s in splits}
    between = []
    for a, b in itertools.combinations(splits, 2):
        held = {data for data, _ in splits[a]}
        if count := sum(data in held for data, _ in splits[b]):
            between.append((a, b, count))
    return len(several), disagree, within, between


def test_counts_agree_with_comparing_one_by_one(tmp_path):
    random = np.random.default_rng(0)
    for trial in range(5):
        splits = {
            split: [(png(int(random.integers(40))), str(random.integers(-1, 3))) for _ in range(count)]
            for split, count in (("train", 25), ("test", 12), ("val", 6))
        }
        found = find_duplicates(indexes(tmp_path / str(trial), splits), progress=False)
        plain = {split: [(data, label.replace("-1", "")) for data, label in images] for split, images in splits.items()}
        assert (found.groups, found.disagreeing, found.within, found.between) == slow(plain)
        copies = Counter(data for images in splits.values() for data, _ in images).values()
        assert sum(map(len, found.listed)) == sum(count for count in copies if count > 1)


def test_leaks_come_first_and_then_labels_that_disagree(tmp_path):
    splits = {
        "train": [(png(0), "0"), (png(0), "0"), (png(1), "0"), (png(1), "1"), (png(2), "1"), (png(3), "1")],
        "test": [(png(9), "0"), (png(3), "1"), (png(2), "0")],
    }
    found = find_duplicates(indexes(tmp_path, splits), progress=False)
    assert found.listed == [
        [Copy("train", "train4", "1"), Copy("test", "test2", "0")],
        [Copy("train", "train5", "1"), Copy("test", "test1", "1")],
        [Copy("train", "train2", "0"), Copy("train", "train3", "1")],
        [Copy("train", "train0", "0"), Copy("train", "train1", "0")],
    ]
    lines = table(folder_stats(tmp_path, progress=False)).splitlines()
    assert "LEAK: 2 of 3 images of test are in train as well" in lines
    assert "train holds 2 images more than once" in lines
    assert "in 2 groups the labels disagree" in lines
    assert "  train train4 (1) = test test2 (0)" in lines


def test_equal_checksums_of_different_bytes_are_no_duplicates(tmp_path):
    one, other = forged(png(1), b"first"), forged(png(1), b"other")
    assert zlib.crc32(one) == zlib.crc32(other)
    assert len(one) == len(other)
    found = find_duplicates(indexes(tmp_path, {"train": [(one, "0"), (other, "1")]}), progress=False)
    assert found == Duplicates(0, 0, {"train": 0}, [], [])


def forged(data: bytes, comment: bytes, wanted: int = 0x12345678) -> bytes:
    """`data` and a comment, and four bytes behind them that give it the wanted CRC-32: it is linear, so they exist."""
    data += comment
    base = zlib.crc32(data + bytes(4))
    rows = [(zlib.crc32(data + (1 << bit).to_bytes(4, "little")) ^ base, 1 << bit) for bit in range(32)]
    left, answer = wanted ^ base, 0
    for bit in reversed(range(32)):  # Gauss's elimination over the field of two elements
        pivot = next(row for row in rows if row[0] >> bit & 1)
        rows.remove(pivot)
        rows = [(a ^ pivot[0], b ^ pivot[1]) if a >> bit & 1 else (a, b) for a, b in rows]
        if left >> bit & 1:
            left, answer = left ^ pivot[0], answer ^ pivot[1]
    return data + answer.to_bytes(4, "little")


def test_damaged_images_are_no_duplicates_and_long_lists_are_cut(tmp_path):
    found = find_duplicates(indexes(tmp_path / "bad", {"train": [(b"<html>", "0")] * 3}), progress=False)
    assert found.groups == 0
    pictures = [png(i, 1, 3) for i in range(LISTED + 5)]
    pictures = [picture for i, picture in enumerate(pictures) if picture not in pictures[:i]]
    splits = {"train": [(picture, "0") for picture in pictures] * 2}
    found = find_duplicates(indexes(tmp_path / "many", splits), progress=False)
    assert (found.groups, found.within["train"], len(found.listed)) == (len(pictures), len(pictures), LISTED)
    text = table(folder_stats(tmp_path / "many", progress=False))
    assert f"  and {len(pictures) - 5} more (--json FILE lists the first 1000)" in text
