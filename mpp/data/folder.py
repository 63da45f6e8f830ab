"""Pictures of a plain folder or archive, read by the code that reads shards, from an index that is never saved."""

import logging
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mpp.augment.config import AugmentConfig
from mpp.augment.input import Input
from mpp.data.batches import NAMED, Batches, Reading
from mpp.data.order import Chain
from mpp.decode import DamagedImage, image_size
from mpp.errors import cause, shown
from mpp.shards.index import Index
from mpp.shards.pictures import Indexed, Shards
from mpp.shards.sources import READ_ERRORS, Files, Picture
from mpp.workers import cores, workers

logger = logging.getLogger("mpp.data")


class Seen(NamedTuple):
    """What one look at a file tells."""

    size: int = 0  # bytes
    crc32: int = 0
    height: int = 1  # a picture without a size would be in the way of those beside it
    width: int = 1
    damage: str = ""


class FilesAsShards(Shards):
    """The files of a source in the place of tars: what the index calls the offset of a picture is its file's number."""

    def __init__(self, index: Index, files: Files) -> None:
        super().__init__(index)
        self._files = files

    def read_at(self, shard: int, offset: int, size: int) -> bytes:
        """The bytes of a file; none if it is gone since it was looked at, which then counts as damage."""
        try:
            return self._files.read(offset)
        except READ_ERRORS as error:
            logger.warning("%s: cannot be read any more: %s", shown(self._files.names[offset]), cause(error))
            return b""


def open_pictures(
    place: Path,
    files: Files,
    pictures: Sequence[Picture],
    classes: Sequence[str],
    batch: int,
    *,
    mode: str,
    input: Input,
) -> tuple[Batches, dict[int, str]]:
    """Batches of pictures of a source (`understand`), in order, centred, and each good one once, as for evaluation.

    Their keys are their paths, their labels numbers of classes. The dictionary says of some, by number, why they are
    damaged or cannot be read, as far as their headers tell; others may turn out so when they are decoded.
    """
    threads = cores()
    with workers(threads, "look") as pool:
        seen = list(pool.map(lambda picture: _look(files, picture), pictures))
    damaged = {number: one.damage for number, one in enumerate(seen) if one.damage}
    for number, why in list(damaged.items())[:NAMED]:
        name = shown(pictures[number].name)
        logger.warning("%s: image %s is damaged and passed over: %s", shown(place), name, why)
    index = _index(place, pictures, seen, classes, mode)
    reading = Reading(
        batch=batch,
        input=input,
        seed=0,
        train=False,
        augment=AugmentConfig(),
        last_batch="kept",
        windowed=False,
        threads=threads,
    )
    order = Chain(index, np.arange(len(index)), shuffled=False)
    return Batches(Indexed(FilesAsShards(index, files)), order, reading), damaged


def _look(files: Files, picture: Picture) -> Seen:
    try:
        data = files.read(picture.number)
        return Seen(len(data), zlib.crc32(data), *image_size(data))
    except DamagedImage as error:
        return Seen(damage=str(error))
    except READ_ERRORS as error:
        return Seen(damage=f"cannot be read: {cause(error)}")


def _index(place: Path, pictures: Sequence[Picture], seen: Sequence[Seen], classes: Sequence[str], mode: str) -> Index:
    numbers = {name: label for label, name in enumerate(classes)}
    keys = [picture.name.encode("utf-8", "surrogateescape") for picture in pictures]

    def column(name: str, dtype: type) -> np.ndarray:
        return np.array([getattr(one, name) for one in seen], dtype)

    return Index(
        folder=place,
        split=pictures[0].split,
        shards=("",),  # so that messages name the folder or archive itself
        shard_bytes=(0,),
        classes=tuple(classes),
        mode=mode,
        shard=np.zeros(len(pictures), np.int32),
        offset=np.array([picture.number for picture in pictures], np.int64),
        size=column("size", np.int64),
        height=column("height", np.int32),
        width=column("width", np.int32),
        label=np.array([-1 if one.label is None else numbers[one.label] for one in pictures], np.int32),
        crc32=column("crc32", np.uint32),
        damaged=np.array([one.damage != "" for one in seen]),
        key_bytes=np.frombuffer(b"".join(keys), np.uint8),
        key_ends=np.cumsum([len(key) for key in keys], dtype=np.int64),
    )
