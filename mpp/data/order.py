"""Which image stands at which position: exact epochs, as a pure function of the seed.

Positions count the images that training sees, from 0, without end and over all ranks. What stands at one depends on
nothing but the seed, so that neither ranks, threads nor interruptions change it.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from mpp.seeds import mix
from mpp.shards.index import Index

WINDOWS, TURNS = 1, 2  # keep these draws apart from those of images


class Order(Protocol):
    """An endless chain of positions; `epoch` of them make one epoch."""

    epoch: int

    def at(self, positions: np.ndarray) -> np.ndarray:
        """The images (b,) at positions (b,)."""

    def instead(self, position: int, bad: np.ndarray) -> int | None:
        """The good image that takes the place of a bad one; None if none is good."""

    def shards(self, first: int, last: int) -> list[int]:
        """The shards that these positions need and those that come soon, in the order in which they are needed."""


class Epoch(NamedTuple):
    """One epoch: its images in turn, cut into windows."""

    order: np.ndarray  # (n,) image numbers
    ends: np.ndarray  # (w,) where each window ends in `order`
    shards: list[np.ndarray]  # of each window


class Chain:
    """The epochs of some images, one behind the other: position p is place p mod n of epoch p // n.

    shuffled: each epoch is a permutation of its own; otherwise the images keep their order.
    window: so many shards, drawn anew each epoch, are read together: all images of one window come, shuffled, before
        those of the next. None for a shuffle of all images, which reads everywhere at once.
    """

    def __init__(
        self, index: Index, numbers: np.ndarray, *, seed: int = 0, window: int | None = None, shuffled: bool = True
    ) -> None:
        self.epoch = len(numbers)
        self._numbers, self._seed, self._shuffled = numbers, seed, shuffled
        self._present, self._shard = np.unique(index.shard[numbers], return_inverse=True)
        self._window = window or len(self._present)
        self._read = functools.lru_cache(maxsize=2)(self._epoch)  # a batch may reach into the next epoch

    def at(self, positions: np.ndarray) -> np.ndarray:
        epochs, places = np.divmod(positions, self.epoch)
        numbers = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            numbers[here] = self._read(epoch).order[places[here]]
        return numbers

    def instead(self, position: int, bad: np.ndarray) -> int | None:
        """The next good image of the same window, after its last the first; of later windows if it has none."""
        epoch, place, window = self._place(position)
        start, end = epoch.ends[window - 1] if window else 0, epoch.ends[window]
        order = np.concatenate([epoch.order[part] for part in np.s_[place:end, start:place, end:, :start]])
        good = order[~bad[order]]
        return int(good[0]) if len(good) else None

    def shards(self, first: int, last: int) -> list[int]:
        """Those of the windows that the positions lie in or, where that is one, of it and the next: two at a time."""
        found, position, windows = [], first, 0
        while (position <= last or windows == 1) and (self._shuffled or position < self.epoch):
            epoch, place, window = self._place(position)
            found += epoch.shards[window].tolist()
            position, windows = position - place + int(epoch.ends[window]), windows + 1
        return list(dict.fromkeys(found))

    def _place(self, position: int) -> tuple[Epoch, int, int]:
        """The epoch of a position, its place there, and the window that this lies in."""
        number, place = divmod(position, self.epoch)
        epoch = self._read(number)
        return epoch, place, int(np.searchsorted(epoch.ends, place, "right"))

    def _epoch(self, number: int) -> Epoch:
        order = np.arange(len(self._present))
        draws = np.zeros(self.epoch, np.uint64)
        if self._shuffled:
            order = np.argsort(mix(self._seed, number, WINDOWS, self._present), kind="stable")
            draws = mix(self._seed, number, self._numbers)
        window_of = np.empty_like(order)
        window_of[order] = np.arange(len(order)) // self._window
        images = np.lexsort([draws, window_of[self._shard]])
        ends = np.cumsum(np.bincount(window_of[self._shard]))
        windows = [self._present[order[start : start + self._window]] for start in range(0, len(order), self._window)]
        return Epoch(self._numbers[images], ends, windows)


class Mixture:
    """Several chains by whole-number weights, each with its own exact epochs.

    Positions go by turns: of the sum of the weights, in an order drawn anew each turn, so many belong to each chain.
    """

    def __init__(self, chains: Sequence[Chain], weights: Sequence[int], epoch: int, seed: int = 0) -> None:
        self.epoch, self._chains, self._seed = epoch, chains, seed
        lowest = np.array(weights, np.int64) // math.gcd(*weights)  # a short turn mixes evenly
        self._weights = lowest
        self._turn = np.repeat(np.arange(len(chains)), lowest)  # (t,) the chain of each place of a turn
        self._rank = np.arange(len(self._turn)) - np.repeat(np.cumsum(lowest) - lowest, lowest)  # in its chain

    def at(self, positions: np.ndarray) -> np.ndarray:
        chains, own = self._split(positions)
        numbers = np.empty_like(positions)
        for chain in np.unique(chains).tolist():
            numbers[chains == chain] = self._chains[chain].at(own[chains == chain])
        return numbers

    def instead(self, position: int, bad: np.ndarray) -> int | None:
        chains, own = self._split(np.array([position]))
        return self._chains[chains[0]].instead(int(own[0]), bad)

    def shards(self, first: int, last: int) -> list[int]:
        chains, own = self._split(np.arange(first, last + 1))
        found: list[int] = []
        for chain in np.unique(chains).tolist():
            places = own[chains == chain]
            found += self._chains[chain].shards(int(places.min()), int(places.max()))
        return list(dict.fromkeys(found))

    def _split(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The chain of each position, and the position in that chain."""
        turns, places = np.divmod(positions, len(self._turn))
        different, which = np.unique(turns, return_inverse=True)
        draws = mix(self._seed, TURNS, different[:, None], np.arange(len(self._turn)))  # (turns, t)
        chains = self._turn[np.argsort(draws, axis=1, kind="stable")]
        rank = np.empty_like(chains)  # of each place among those of its chain in the turn
        np.put_along_axis(rank, np.argsort(chains, axis=1, kind="stable"), self._rank[None], axis=1)
        chains, rank = chains[which, places], rank[which, places]
        return chains, turns * self._weights[chains] + rank
