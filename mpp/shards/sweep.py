"""Once over many images, in the order in which they lie in their shards."""

from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from mpp.errors import shown
from mpp.shards.index import Index
from mpp.shards.pictures import Shards
from mpp.shards.tar import ShardError
from mpp.workers import cores, workers

T = TypeVar("T")
CHUNK = 64  # images of one task


def sweep(
    index: Index, numbers: np.ndarray, work: Callable[[Shards, list[int]], T], title: str, progress: bool = True
) -> Iterator[T]:
    """What `work` gives for each chunk of images, in their order; one thread a core calls it."""
    if index.remote:
        raise ShardError(f"{index.origin}: its shards are URLs; fetch them to look at every image")
    if not len(numbers):
        return
    shards = Shards(index)
    chunks = [numbers[start : start + CHUNK].tolist() for start in range(0, len(numbers), CHUNK)]
    with (
        workers(cores()) as pool,
        tqdm(desc=f"{title} {shown(index.split)}", total=len(numbers), unit="image", disable=not progress) as bar,
    ):
        for chunk, result in zip(chunks, pool.map(lambda chunk: work(shards, chunk), chunks), strict=True):
            bar.update(len(chunk))
            yield result
    shards.close()
