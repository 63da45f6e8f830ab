"""Batches of a torch DataLoader, or of anything else that gives images and labels, for `mpp.train`."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mpp.batch import Batch
from mpp.errors import UserError

logger = logging.getLogger("mpp.data")


class Images(Protocol):
    """Where batches come from; `mpp.read_shards` gives one."""

    def at(self, step: int) -> Batch: ...

    def iterate(self, start: int, stop: Sequence[int] = ()) -> Iterator[Batch]:
        """Yields the batches from `start` on; ends early, instead of waiting for one, once `stop` holds something."""


class BatchesError(UserError):
    """What was given as batches are none."""


class Loaded:
    """Batches of an iterable, again and again from its beginning.

    An iterable has no place to go on from: a run that was interrupted goes on from its last step, but with the
    iterable's beginning, so that its images, and the weights at its end, are other ones than without the interruption.
    `mpp.read_shards` has places.
    """

    def __init__(self, source: Iterable[Any]) -> None:
        self._source = source
        self._first: Batch | None = None
        self._begun: Iterator[Any] | None = None  # looked at, and not yet read

    def at(self, step: int) -> Batch:
        """The first batch, whichever step is asked for: to look at."""
        if self._first is None:
            self._begun = iter(self._source)
            item = next(self._begun, None)
            if item is None:
                raise BatchesError("batches: expected at least one, found none")
            self._first = as_batch(item)
        return self._first

    def iterate(self, start: int = 0, stop: Sequence[int] = ()) -> Iterator[Batch]:
        """Yields batches without end, or until an iterator ends, which begins only once."""
        if start:
            logger.warning("step %d: goes on with other images than without the stop, as a loader has no places", start)
        while True:
            yield self.at(start)
            assert self._begun is not None
            yield from map(as_batch, self._begun)
            if iter(self._source) is self._source:
                return
            self._first = None


def as_batch(item: Any) -> Batch:
    """Images, or images with labels, as a Batch; BatchesError, one line, for anything else."""
    if isinstance(item, Batch):
        return item
    parts = item if isinstance(item, tuple | list) else (item,)  # a TensorDataset gives even images alone in a list
    images, labels = parts if len(parts) == 2 else (parts[0] if len(parts) == 1 else item, None)
    if not (isinstance(images, Tensor) and images.ndim == 4):
        raise BatchesError(f"batches: expected images (b, c, h, w) or (images, labels), found {_described(item)}")
    if labels is None:
        return Batch(images)
    whole = isinstance(labels, Tensor) and not labels.is_floating_point() and labels.dtype != torch.bool
    if not whole or labels.shape != images.shape[:1]:
        expected = f"labels as whole numbers ({len(images)},), one an image"
        raise BatchesError(f"batches: expected {expected}, found {_described(labels)}")
    return Batch(images, labels.long())


def as_batches(given: Any) -> Images:
    """What `mpp.train` was given to train on, as an object with `at(step)` and `iterate(start, stop)`."""
    if hasattr(given, "iterate") and hasattr(given, "at"):
        return given
    if hasattr(given, "__iter__"):
        return Loaded(given)
    hint = "; give it to a torch.utils.data.DataLoader" if hasattr(given, "__getitem__") else ""
    raise BatchesError(
        f"batches: expected what mpp.read_shards gives, a DataLoader or another iterable of (images, labels), found "
        f"{type(given).__name__}{hint}"
    )


def _described(item: Any) -> str:
    if isinstance(item, Tensor):
        return f"{item.dtype} {tuple(item.shape)}".removeprefix("torch.")
    if isinstance(item, tuple | list):
        return f"{type(item).__name__} of {', '.join(map(_described, item[:4]))}"
    return type(item).__name__
