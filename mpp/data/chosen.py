"""Which images a run trains on and which it is scored on, as the `data` section of a recipe chooses."""

from collections.abc import Sequence

import numpy as np

from mpp.data.config import DataConfig, SubsetConfig
from mpp.data.subset import drawn, held_out
from mpp.shards.classes import first_names, relabelled
from mpp.shards.index import Index, ShardError, read_index


def chosen(
    data: DataConfig, seed: int, labelled: bool, classes: Sequence[str] = ()
) -> tuple[list[Index], Index | None]:
    """The images to train on, those of `data.path` and then those of each of `data.mix`, and those to score on.

    labelled: only images with a label are of use; their labels are numbered alike, by the names of the classes.
    classes: those names in order, where they are known; those of `data.path` where not. Scored are the images held out
    of train if there are any, or else `data.val`. Raises ShardError, also for an image of a class that is none of them.
    """
    index, scored = read_index(data.path, data.train, data.allow), None
    if labelled and classes:
        found = f"{index.origin}: has {len(index.classes)} classes ({first_names(index.classes)})"
        index = relabelled(index, classes, f"{found}, objective.classes are {len(classes)} ({first_names(classes)})")
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
        scored = relabelled(scored, index.classes)
        scored = scored.select(drawn(scored, SubsetConfig(), seed)[0])
    return [index, *_mixed_in(data, index, seed, labelled)], scored


def _mixed_in(data: DataConfig, index: Index, seed: int, labelled: bool) -> list[Index]:
    others = []
    for name, part in data.mixed.items():
        other = read_index(part.path, part.train, data.allow)
        if labelled:
            found = f"{other.origin}: data.mix.{name}: has {len(other.classes)} classes ({first_names(other.classes)})"
            other = relabelled(
                other, index.classes, f"{found}, expected those of data.path ({first_names(index.classes)})"
            )
        others.append(other.select(drawn(other, SubsetConfig(), seed)[0]) if labelled else other)
    return others
