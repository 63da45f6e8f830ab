"""`mpp shards check`: decodes every image of a folder of shards and lists the bad ones."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from mpp.decode import DamagedImage
from mpp.errors import shown
from mpp.shards.index import Index, no_index, read_index, refuse_url, splits, write_index
from mpp.shards.pictures import Indexed, Shards
from mpp.shards.sweep import sweep


def check_folder(folder: str | Path, mark: bool = False, report: Callable[[str], None] = print) -> int:
    """Decodes every image and compares checksums; returns how many are bad and lists each with its cause.

    With `mark` the index remembers them, so that training draws no replacement for them again and again.
    """
    refuse_url(folder)
    if not splits(folder):
        raise no_index(Path(folder), "train")
    count = 0
    for index in [read_index(folder, split) for split in splits(folder)]:
        bad = _bad_images(index)
        for i, why in bad.items():
            report(f"{shown(index.shards[index.shard[i]])} {shown(index.key(i))}: {why}")
        if mark:
            write_index(replace(index, damaged=np.isin(np.arange(len(index)), list(bad))))
        marked = ", marked in the index" if mark and bad else ""
        report(f"{shown(index.split)}: {len(index)} images checked, {len(bad)} bad{marked}")
        count += len(bad)
    return count


def _bad_images(index: Index) -> dict[int, str]:
    """The cause for each image that does not decode to what the index says."""
    bad: dict[int, str] = {}
    for found in sweep(index, np.arange(len(index)), _check_images, "check"):
        bad |= found
    return bad


def _check_images(shards: Shards, numbers: list[int]) -> dict[int, str]:
    images, bad = Indexed(shards), {}
    for i in numbers:
        try:
            images[i]
        except DamagedImage as error:
            bad[i] = str(error)
    return bad
