"""Randomness without state: every draw is a hash of what it is for.

A permutation is a function of (seed, epoch), an augmentation of (seed, position), a mask of (seed, step, place in the
batch; see draws.py). So neither the number of workers nor an interruption can change a draw, and resuming needs no
generator state. The hash is SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"),
written out here because NumPy does not promise that its generators' streams stay the same between versions.
"""

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # SplitMix64's increment
Words = np.ndarray  # uint64


def _finalise(words: Words) -> Words:
    """SplitMix64's output function: each input bit flips each output bit with probability one half."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def mix(*parts: int | np.ndarray) -> Words:
    """Hashes integers, or arrays of them that broadcast against each other, to uint64 words of that shape."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2 ** 64 is the point
        words: Words = np.zeros(1, np.uint64)
        for part in parts:
            part = np.asarray(part).astype(np.uint64)
            words = _finalise((words + GOLDEN) ^ _finalise(part + GOLDEN))
    return words


def seed_of(*parts: int) -> int:
    """One seed for torch.manual_seed, in [0, 2 ** 63)."""
    return int(mix(*parts)[0] >> np.uint64(1))


def uniform(count: int, *parts: int | np.ndarray) -> np.ndarray:
    """`count` independent float64 numbers in [0, 1) for each hashed element: (..., count)."""
    words = mix(*(np.asarray(part)[..., None] for part in parts), np.arange(count))
    return (words >> np.uint64(11)) * (1.0 / (1 << 53))


def permutation(count: int, *parts: int) -> np.ndarray:
    """A permutation of range(count), int64, that depends on `parts` alone."""
    return np.argsort(mix(*parts, np.arange(count)), kind="stable")
