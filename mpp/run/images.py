"""The images of a run: which it trains on and is scored on, opened for reading."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mpp.data.batches import Batches, faster
from mpp.data.chosen import chosen
from mpp.data.config import DataConfig, PrepareName, ShuffleName
from mpp.data.read import open_batches, windowed
from mpp.data.subset import some_labelled
from mpp.execution import Once
from mpp.files import BusyError
from mpp.hardware import device_of
from mpp.ranks import here
from mpp.recipe import Recipe
from mpp.recipe.settled import Settled
from mpp.remote.urls import is_url
from mpp.shards.classes import lacking, listed, relabelled, union
from mpp.shards.index import UNFINISHED, Index, ShardError, splits
from mpp.shards.write import make_shards

POLL = 1.0  # seconds between looks at shards that another process is making

logger = logging.getLogger("mpp.run")


@dataclass(frozen=True)
class RunImages:
    """What a run reads."""

    recipe: Recipe  # with a plain value for where pictures are made
    batches: Batches  # to train on
    scored: Index | None
    known: Index | None  # whose labels tell the classes of their neighbours among those scored
    shuffle: ShuffleName
    opened: list[Batches]  # all that `close` gives up

    def open_scored(self, batch: int) -> Batches | None:
        """Batches of the images to score on, `eval.images` of them at most, if there are any."""
        return None if self.scored is None else self._opened(self.scored, batch)

    def open_known(self, batch: int) -> Batches | None:
        """Batches of `eval.knn` labelled images to train on, as evaluation sees them, if it is asked for."""
        return None if self.known is None else self._opened(self.known, batch, views={})

    def _opened(self, index: Index, batch: int, **data: Any) -> Batches:
        """Batches of an index as evaluation sees them, with other settings of the section data."""
        self.opened.append(_open(self.recipe, [index], batch, train=False, **data))
        return self.opened[-1]

    def close(self) -> None:
        """Gives up on whatever is still being read or fetched."""
        for batches in self.opened:
            batches.close()


def open_images(recipe: Recipe, settled: Settled | None, once: Once) -> RunImages:
    """Opens the images of a recipe, whose shards are made first if it says from what.

    settled: what an earlier start of the run chose.
    """
    if settled is not None:
        recipe = settled.for_machine(recipe)
    make_missing(recipe.data)
    needs = recipe.objective.needs
    classes = needs.classes or (settled.classes if settled is not None else ())  # a run keeps the order it began with
    train, scored = chosen(recipe.data, recipe.seed, needs.labels, classes)
    recipe = replace(recipe, data=replace(recipe.data, prepare=_prepare(recipe, train, once)))
    batches = _open(recipe, train, recipe.train.batch, train=True)
    if needs.labels and scored is not None:
        check_classes(batches.index, scored)
    if scored is not None:
        scored = scored.select(np.arange(min(len(scored), recipe.eval.images)))
    known = None
    if recipe.eval.knn and scored is not None:
        known, scored = comparable(train[0], scored, recipe.eval.knn)
    shuffle: ShuffleName = "window" if windowed(batches.index, recipe.data) else "all"
    return RunImages(recipe, batches, scored, known, shuffle, [batches])


def comparable(train: Index, scored: Index, count: int) -> tuple[Index, Index]:
    """So many labelled images to train on, and those scored, with classes numbered alike; ShardError without labels."""
    for index in (train, scored):
        if not (index.label >= 0).any():
            raise ShardError(f"{index.origin}: split {index.split} has no labels, which eval.knn needs")
    classes = union([train.classes, scored.classes])
    train, scored = relabelled(train, classes), relabelled(scored, classes)
    return train.select(some_labelled(train, count)), scored


def make_missing(data: DataConfig) -> None:
    """Makes the shards of `data.path` from `data.source`, if that is given and they are not there or not done.

    Where another process is making them, waits for it, and goes on if it ends before they are done.
    """
    folder, told = Path(data.path), False
    while data.source and not is_url(data.path) and (not splits(folder) or (folder / UNFINISHED).exists()):
        try:
            make_shards(data.source, folder)
        except BusyError:
            if not told:
                logger.info("%s: another process is making these shards; waiting for it", folder)
            told = True
            time.sleep(POLL)


def _prepare(recipe: Recipe, train: Sequence[Index], once: Once) -> PrepareName:
    """Where pictures are made: as the recipe says or, if it leaves that open, where it is faster."""
    asked, device = recipe.data.prepare, device_of(recipe.train.device)
    if asked != "auto":
        return asked
    if device.type != "cuda":
        return "cpu"

    def measure() -> PrepareName:
        on_cpu, there = (
            _open(_preparing(recipe, way), train, recipe.train.batch, train=True) for way in ("cpu", "device")
        )
        chosen = there if there.stored else faster(on_cpu, there)
        chosen.close()  # opened again below: a choice that others made has no batches
        return chosen.prepared

    height, width = recipe.model.image
    return once(f"prepare {height}x{width}", measure)


def _preparing(recipe: Recipe, way: PrepareName) -> Recipe:
    return replace(recipe, data=replace(recipe.data, prepare=way))


def _open(recipe: Recipe, indexes: Sequence[Index], batch: int, *, train: bool, **data: Any) -> Batches:
    """Batches of some images, made where `data.prepare` says. data: other settings of that section than the recipe's,
    which an objective that needs them would refuse of a recipe."""
    found, expected = indexes[0].channels, recipe.model.channels
    if found != expected:
        remedy = "; mpp shards make --mode L makes grey ones" if (found, expected) == (3, 1) else ""
        raise ShardError(f"{indexes[0].origin}: images have {found} channels, model.channels is {expected}{remedy}")
    device = device_of(recipe.train.device) if recipe.data.prepare == "device" else None
    settings = replace(recipe.data, **data)
    opened = partial(open_batches, indexes, batch, settings, image=recipe.model.image, seed=recipe.seed)
    return opened(train=train, device=device, rank=here().rank, ranks=here().size)


def check_classes(train: Index, scored: Index) -> None:
    """Raises ShardError for a class that is scored and that no image to train on has."""
    if names := lacking(train, scored):
        raise ShardError(
            f"{scored.origin}: split {scored.split} has images of class {listed(names)}, "
            f"of which split {train.split} has none to train on"
        )
