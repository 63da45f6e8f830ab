"""Which images a run trains on and which it is scored on, as the `data` section of a recipe chooses."""

import numpy as np

from mpp.data.config import DataConfig, SubsetConfig
from mpp.data.subset import drawn, held_out
from mpp.shards.index import Index, ShardError, read_index


def chosen(data: DataConfig, seed: int, labelled: bool) -> tuple[list[Index], Index | None]:
    """The images to train on, those of `data.path` and then those of each of `data.mix`, and those to score on.

    labelled: only images with a label are of use. Scored are the images held out of train if there are any, or else
    `data.val`. Raises ShardError.
    """
    index, scored = read_index(data.path, data.train, data.allow), None
    if data.hold_out:
        held = held_out(index, data.hold_out)
        index, scored = index.select(np.flatnonzero(~held)), index.select(np.flatnonzero(held))
        if not len(index) or not len(scored):
            found = f"{len(scored)} of {len(index) + len(scored)} images"
            raise ShardError(f"{index.origin}: data.hold_out {data.hold_out} holds out {found}; expected some, not all")
    if labelled or data.subset != SubsetConfig():
        numbers, rest = drawn(index, data.subset, seed)
        scored = index.select(rest) if len(rest) else scored
        index = index.select(numbers)
    if scored is None and data.val is not None:
        scored = read_index(data.path, data.val, data.allow)
    if labelled and scored is not None:
        scored = scored.select(drawn(scored, SubsetConfig(), seed)[0])
    return [index, *_mixed_in(data, index, seed, labelled)], scored


def _mixed_in(data: DataConfig, index: Index, seed: int, labelled: bool) -> list[Index]:
    others = []
    for name, part in data.mixed.items():
        other = read_index(part.path, part.train, data.allow)
        if labelled and other.classes != index.classes:
            raise ShardError(
                f"{other.origin}: data.mix.{name}: has {len(other.classes)} classes ({', '.join(other.classes)[:60]}), "
                f"expected those of data.path ({', '.join(index.classes)[:60]})"
            )
        others.append(other.select(drawn(other, SubsetConfig(), seed)[0]) if labelled else other)
    return others
