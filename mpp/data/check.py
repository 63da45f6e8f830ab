"""`mpp shards check`: decodes every image of a folder of shards and lists the bad ones."""

import mmap
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mpp.data.decode import DamagedImage, decode
from mpp.data.index import Index, no_index, read_index, splits, write_index
from mpp.errors import shown

CHUNK = 256  # images of one task


def check_folder(folder: str | Path, mark: bool = False, report: Callable[[str], None] = print) -> int:
    """Decodes every image and compares checksums; returns how many are bad and lists each with its cause.

    With `mark` the index remembers them, so that training draws no replacement for them again and again.
    """
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
    with ThreadPoolExecutor() as pool, tqdm(desc=f"check {shown(index.split)}", total=len(index), unit="image") as bar:
        for shard, name in enumerate(index.shards):
            with open(index.folder / name, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as tar:
                inside = np.flatnonzero(index.shard == shard)
                chunks = np.split(inside, range(CHUNK, len(inside), CHUNK))
                for found in pool.map(lambda chunk: _check_images(index, tar, chunk), chunks):
                    bad |= found
                bar.update(len(inside))
    return bad


def _check_images(index: Index, tar: mmap.mmap, chunk: np.ndarray) -> dict[int, str]:
    bad: dict[int, str] = {}
    for i in chunk.tolist():
        data = tar[index.offset[i] : index.offset[i] + index.size[i]]
        try:
            image = decode(data, index.mode)
        except DamagedImage as error:
            bad[i] = str(error)
            continue
        if zlib.crc32(data) != index.crc32[i]:
            bad[i] = "its bytes have changed since the index was made (checksum)"
        elif image.shape[:2] != (index.height[i], index.width[i]):
            bad[i] = f"{image.shape[1]}x{image.shape[0]} pixels, the index says {index.width[i]}x{index.height[i]}"
    return bad
