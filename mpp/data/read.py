"""Opening shards for reading: which images in which order, from where, and how they become batches."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from mpp.augment.config import AugmentConfig
from mpp.augment.input import Input
from mpp.data.batches import Batches, Part, Reading
from mpp.data.config import DataConfig, LastBatch, ReaderName, SamplingName, ShuffleName, ViewConfig
from mpp.data.order import Chain, Mixture, Order
from mpp.files import cache_folder
from mpp.launch import launched, own_cores
from mpp.remote.cache import Cache
from mpp.shards.classes import relabelled
from mpp.shards.index import Index, ShardError, merged, read_index
from mpp.shards.pictures import Indexed, Resident, Shards, decoded_bytes, sizes_of

GIB = 2**30
# Up to so many pixels decoding takes microseconds, which threads would spend waiting for the interpreter: 32x32 pixels
# are read no faster in two threads than in one (`python -m benchmarks.reading`).
SMALL_PIXELS = 64 * 64


def read_shards(
    path: str | Path,
    batch: int,
    *,
    split: str = "train",
    image: tuple[int, int] | None = None,
    input: Input | None = None,
    seed: int = 0,
    train: bool = True,
    augment: AugmentConfig | None = None,
    views: Mapping[str, ViewConfig] | None = None,
    shuffle: ShuffleName = "auto",
    window: int = 16,
    sampling: SamplingName = "images",
    last_batch: LastBatch = "chained",
    reader: ReaderName = "auto",
    memory: float = 4.0,
    threads: int | None = None,
    cache: str | None = None,
    cache_gib: float = 32.0,
    allow: tuple[Literal["pipe"], ...] = (),
    numbers: np.ndarray | None = None,
    classes: Sequence[str] = (),
    rank: int = 0,
    ranks: int = 1,
) -> Batches:
    """Opens a split of a folder of shards, or of its URL, for reading in batches; docs/data.md says what is promised.

    batch: images of one step, over all ranks.
    image: (h, w) of the pictures; that of the shards' images where all are of one size.
    input: what an encoder is fed (`encoder.input`), in the place of `image` and of what `augment` says of evaluation.
    train: shuffled, augmented and endless; otherwise in order, centred, and each good image once.
    views: more pictures of each image, in Batch.views, by any name: in evaluation too, where they are drawn as well.
    shuffle, window, sampling, last_batch, cache, cache_gib, allow: as in the `data` section of a recipe (DataConfig).
    reader: "resident" keeps what it has decoded in memory, "indexed" decodes every time, "auto" is resident for up to
        `memory` GiB. Both give the same batches, bit for bit.
    numbers: of the only images to read, as the index counts them.
    classes: names by which labels are numbered, in place of the index's own order: those of another split, such as
        `train.index.classes`, or of a classifier. An index that has images of other classes is refused.
    rank, ranks: of the processes that share each batch; this one gets its part.

    Raises `ShardError`, a ValueError of one line, if the shards are not there, not whole or not as their index says.
    """
    config = DataConfig(
        path=str(path),
        train=split,
        sampling=sampling,
        last_batch=last_batch,
        shuffle=shuffle,
        window=window,
        augment=augment or AugmentConfig(),
        views=dict(views or {}),
        reader=reader,
        memory=memory,
        threads=threads,
        cache=cache,
        cache_gib=cache_gib,
        allow=allow,
    )
    index = read_index(path, split, allow)
    if numbers is not None:
        index = index.select(numbers)
    if len(classes):
        index = relabelled(index, classes)
    return open_batches(
        [index], batch, config, image=image, input=input, seed=seed, train=train, rank=rank, ranks=ranks
    )


def open_batches(
    indexes: Sequence[Index],
    batch: int,
    config: DataConfig,
    *,
    image: tuple[int, int] | None = None,
    input: Input | None = None,
    seed: int = 0,
    train: bool = True,
    rank: int = 0,
    ranks: int = 1,
    device: torch.device | None = None,
) -> Batches:
    """Batches of one data set or, in training, of several: that of `config.path`, then those of `config.mix`.

    device: where pictures are made, if not on the CPU; see mpp.data.on_device.
    """
    if batch < 1 or not 0 <= rank < ranks:
        raise ShardError(f"a batch needs at least 1 image and a rank of 0 to ranks - 1, got {batch}, {rank} of {ranks}")
    if empty := [index for index in indexes if not len(index)]:
        raise ShardError(f"{empty[0].origin}: split {empty[0].split} holds no images")
    index = merged(indexes)
    window = config.window if windowed(index, config) else None
    if train:
        order = _order(index, [len(index) for index in indexes], config, window, seed)
    else:
        order = Chain(index, np.arange(len(index)), window=window, shuffled=False)
    shards = Shards(index, _cache(index, config))
    kept = decoded_bytes(index) * launched().local_size  # by all processes of this machine
    resident = config.reader == "resident" or (config.reader == "auto" and kept <= config.memory * GIB)
    images = (Resident if resident else Indexed)(shards)
    input = input or config.augment.input(image or _common_size(index))
    reading = Reading(
        batch=batch,
        input=input,
        seed=seed,
        train=train,
        augment=config.augment,
        last_batch=config.last_batch,
        windowed=window is not None,
        threads=config.threads or _threads_for(index),
        part=Part(rank, ranks),
        views=config.further_views(input.image),
    )
    if device is not None:
        from mpp.data.on_device import DeviceBatches  # here, as torchvision's transforms take a second to import

        return DeviceBatches(images, order, reading, device)
    return Batches(images, order, reading)


def _order(index: Index, counts: Sequence[int], config: DataConfig, window: int | None, seed: int) -> Order:
    """The chain of a data set, or the chains of several, or of the classes of one, by turns."""
    if config.sampling == "classes":
        if window is not None:
            raise ShardError(f"{index.origin}: data.sampling: classes needs data.shuffle: all; shards by URL have not")
        order = np.argsort(index.label, kind="stable")
        order = order[index.label[order] >= 0]
        sets = np.split(order, np.flatnonzero(np.diff(index.label[order])) + 1) if len(order) else []
        if not sets:
            raise ShardError(f"{index.origin}: split {index.split} has no labels; data.sampling: classes needs some")
        chains = [Chain(index, numbers, seed=seed) for numbers in sets]
        return Mixture(chains, [1] * len(sets), sum(map(len, sets)), seed)
    sets = np.split(np.arange(len(index)), np.cumsum(counts)[:-1])
    chains = [Chain(index, numbers, seed=seed, window=window) for numbers in sets]
    if len(chains) == 1:
        return chains[0]
    return Mixture(chains, config.weights, epoch_of(counts[0], config), seed)


def epoch_of(images: int, config: DataConfig) -> int:
    """Positions of an epoch, that of `config.path` with so many images, those mixed in counted."""
    return math.ceil(images * sum(config.weights) / config.weight)


def windowed(index: Index, config: DataConfig) -> bool:
    """Whether images are shuffled within a window of shards; what is fetched is, unless asked otherwise."""
    return config.shuffle == "window" or (config.shuffle == "auto" and index.remote)


def _cache(index: Index, config: DataConfig) -> Cache | None:
    """Where shards are fetched to, if they are: large enough for the windows that are read side by side."""
    if not index.remote:
        return None
    sizes = sorted(index.shard_bytes, reverse=True)
    if windowed(index, config):
        sizes = sizes[: 2 * config.window * (1 + len(config.mixed))]
    if (need := sum(sizes) / GIB) > config.cache_gib:
        window = "two windows of shards" if windowed(index, config) else "all shards, shuffled at once,"
        raise ShardError(
            f"{index.origin}: {window} take {need:.3g} GiB, data.cache_gib is {config.cache_gib:g}; "
            "raise it, or take a smaller data.window"
        )
    return Cache(config.cache or cache_folder("shards"), int(config.cache_gib * GIB), allow=config.allow)


def _threads_for(index: Index) -> int:
    """One for each core of this process, but a single one for small images."""
    small = np.median(index.height.astype(np.int64) * index.width) <= SMALL_PIXELS
    return 1 if small else own_cores()


def _common_size(index: Index) -> tuple[int, int]:
    """The (h, w) of all images."""
    sizes = sizes_of(index)
    if len(sizes) != 1:
        found = f"{len(sizes)} sizes" if len(sizes) else "no size that could be read"
        raise ShardError(
            f"{index.origin}: images of split {index.split} have {found}; say which to make of them (image=)"
        )
    return sizes[0]
