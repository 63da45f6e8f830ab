"""Random numbers without a generator: each image of a step has its own, on whatever device it is computed.

A mask or a dropped path is a function of (seed, step, the image's place in the whole batch) alone. A generator's
numbers depend on the device, on torch.compile, and on how a batch is split into micro-batches and among processes. Each
image has a stream of SplitMix64 (mpp.seeds), here in torch's int64, whose products wrap as those of uint64 do.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from mpp.seeds import mix

GOLDEN, FIRST, SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # those of seeds.py, as int64
LANES = 4  # draws of `hits` that one word gives, 16 bits each
BATCH = 0x6261746368  # "batch": stands in an image's place where a draw is the whole batch's; no batch is as large


class Draws:
    """From what the images of a micro-batch draw. images: (b,) int64, a key each. batch: (1,), that of the batch."""

    def __init__(self, images: Tensor, batch: Tensor) -> None:
        self.images, self.batch = images, batch
        self.calls = 0  # each draw is another one; the program's order tells them apart


_now: Draws | None = None


def keys_of(seed: int, step: int, places: np.ndarray) -> Tensor:
    """The keys (b + 1,) int64 of images at these places of the whole batch of a step, and behind them the batch's."""
    return torch.from_numpy(mix(seed, step, np.append(places, BATCH)).view(np.int64))


@contextmanager
def drawing(keys: Tensor) -> Iterator[None]:
    """What is drawn inside is that of a batch's images, by `keys_of`. Outside, torch's generator gives the keys."""
    global _now
    before, _now = _now, Draws(keys[:-1], keys[-1:])
    try:
        yield
    finally:
        _now = before


def keys(rows: int, device: torch.device) -> Tensor:
    """New keys (rows,) int64, one an image: other ones at each call. Rows may be several views of the batch's images,
    one behind the other; ValueError where they are not."""
    now = _now
    if now is None:
        return _of_generator(rows, device)
    images = len(now.images)
    if rows % images:
        raise ValueError(f"{rows} rows can't draw as {images} images do; expected one or several views of each")
    now.calls += 1
    if rows == images:
        return apart(now.images, now.calls)
    views = torch.arange(rows // images, device=device).repeat_interleave(images)  # (rows,)
    return apart(apart(now.images, now.calls).repeat(rows // images), views)


def batch_keys(device: torch.device) -> Tensor:
    """A new key (1,) int64, the same one for the whole batch, wherever its images are."""
    now = _now
    if now is None:
        return _of_generator(1, device)
    now.calls += 1
    return apart(now.batch, now.calls)


def _of_generator(rows: int, device: torch.device) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (rows,), device=device)


def apart(keys: Tensor, number: int | Tensor) -> Tensor:
    """Keys (b,) of streams of their own, by number: for the parts of a model that draw from the same keys."""
    return _finalise((_finalise(keys) + number) * GOLDEN)


def words(keys: Tensor, count: int) -> Tensor:
    """The first `count` numbers of each stream, (b, count) int64, all bits random."""
    numbers = torch.arange(1, count + 1, device=keys.device)
    # SplitMix64 from the state key * GOLDEN. Inductor's code for GOLDEN * numbers alone writes where it should not.
    return _finalise((keys.unsqueeze(1) + numbers) * GOLDEN)


def uniform(keys: Tensor, count: int) -> Tensor:
    """Numbers in [0, 1): (b, count) float32, multiples of 2 ** -24."""
    return _right(words(keys, count), 40).float() * 2.0**-24


def below(keys: Tensor, count: int, limit: int) -> Tensor:
    """Whole numbers in [0, limit), (b, count) int64; limit is at most 2 ** 31, of which the draw has 31 bits."""
    return (_right(words(keys, count), 33) * limit) >> 31


def hits(keys: Tensor, count: int, chance: float) -> Tensor:
    """Which of `count` things happen, (b, count) bool, by a chance that is rounded to a multiple of 2 ** -16."""
    lanes = words(keys, -(-count // LANES)).view(torch.int16)[:, :count]  # in [-2 ** 15, 2 ** 15)
    return (
        lanes <= round(2**16 * rounded(chance)) - 2**15 - 1 if chance > 0 else torch.zeros_like(lanes, dtype=torch.bool)
    )


def rounded(chance: float) -> float:
    """The chance that `hits` has: below 1 for one below 1, so that something is left."""
    return (round(chance * 2**16) if chance >= 1 else min(round(chance * 2**16), 2**16 - 1)) / 2**16


def _finalise(words: Tensor) -> Tensor:
    """SplitMix64's output function, as in seeds.py."""
    words = (words ^ _right(words, 30)) * FIRST
    words = (words ^ _right(words, 27)) * SECOND
    return words ^ _right(words, 31)


def _right(words: Tensor, bits: int) -> Tensor:
    """Shifts 64 bits to the right; torch's own shift repeats the sign."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)
