import numpy as np

from mpp.seeds import mix, permutation, seed_of, uniform


def splitmix(state: int) -> int:
    """SplitMix64's next output in Python's own integers (Vigna's public-domain C)."""
    mask = 2**64 - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def slow_mix(*parts: int) -> int:
    """Each part's SplitMix output is mixed into the state."""
    words = 0
    for part in parts:
        state = (words + 0x9E3779B97F4A7C15) & (2**64 - 1)
        words = splitmix((state ^ splitmix(part)) - 0x9E3779B97F4A7C15 & (2**64 - 1))
    return words


def test_the_hash_is_splitmix64_in_plain_integers():
    assert splitmix(0) == 0xE220A8397B1DCDAF, "the first output of SplitMix64 seeded with 0, as published"
    for parts in [(0,), (1, 2, 3), (2**63 - 1, 0, 10**12)]:
        assert int(mix(*parts)[0]) == slow_mix(*parts)


def test_arrays_are_hashed_element_by_element():
    assert mix(7, np.arange(5), 3).tolist() == [slow_mix(7, i, 3) for i in range(5)]


def test_uniform_numbers_are_uniform_and_unrelated():
    draws = uniform(4, 1, np.arange(50_000))
    assert draws.shape == (50_000, 4)
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.stack([np.histogram(draws[:, i], 50, (0, 1))[0] for i in range(4)])
    assert (abs(counts - 1000) < 5 * np.sqrt(1000)).all()
    correlation = np.corrcoef(np.concatenate([draws[:-1], draws[1:]], axis=1).T) - np.eye(8)
    assert abs(correlation).max() < 5 / np.sqrt(50_000)


def test_permutations_hold_each_number_once_and_differ_between_epochs():
    first, second = permutation(1000, 5, 0), permutation(1000, 5, 1)
    assert sorted(first.tolist()) == list(range(1000))
    assert (first != second).mean() > 0.99
    assert (first == permutation(1000, 5, 0)).all()


def test_seeds_fit_torch_and_differ():
    seeds = {seed_of(0, step, part) for step in range(100) for part in range(10)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
