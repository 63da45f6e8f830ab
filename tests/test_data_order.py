"""Orders of positions, counted image by image."""

from pathlib import Path

import numpy as np
import pytest

from mpp.data.order import Chain, Mixture
from mpp.seeds import permutation
from mpp.shards.index import Index


def index_of(images: list[int]) -> Index:
    """An index whose shards hold so many images each."""
    n = sum(images)
    zeros = np.zeros(n, np.int64)
    return Index(
        folder=Path("nowhere"),
        split="train",
        shards=tuple(f"train-{i:06d}.tar" for i in range(len(images))),
        shard_bytes=tuple(512 for _ in images),
        classes=(),
        mode="RGB",
        shard=np.repeat(np.arange(len(images), dtype=np.int32), images),
        offset=zeros,
        size=zeros,
        height=zeros,
        width=zeros,
        label=zeros - 1,
        crc32=zeros,
        damaged=zeros > 0,
        key_bytes=zeros[:0].astype(np.uint8),
        key_ends=zeros,
    )


SHARDS = [7, 1, 12, 5, 5, 9, 2, 11, 3, 8]  # images
INDEX = index_of(SHARDS)
EVERY = np.arange(sum(SHARDS))


def window_chain(window: int, seed: int = 3) -> Chain:
    return Chain(INDEX, EVERY, seed=seed, window=window)


def test_without_a_window_an_epoch_is_the_permutation_of_seed_and_epoch():
    chain = Chain(INDEX, EVERY, seed=5)
    expected = np.concatenate([permutation(len(EVERY), 5, epoch) for epoch in range(3)])
    assert chain.at(np.arange(3 * len(EVERY))).tolist() == expected.tolist()


@pytest.mark.parametrize("window", [1, 3, 4, 10, 50])
def test_a_window_shuffle_shows_each_image_once_an_epoch(window):
    chain = window_chain(window)
    for epoch in range(3):
        assert sorted(chain.at(epoch * chain.epoch + EVERY).tolist()) == EVERY.tolist()


@pytest.mark.parametrize("window", [1, 3, 4])
def test_a_window_shuffle_stays_within_a_few_shards_at_a_time(window):
    chain, count = window_chain(window), 0
    for epoch in range(4):
        shards = INDEX.shard[chain.at(epoch * chain.epoch + EVERY)].tolist()
        seen: list[set[int]] = [set()]
        for shard in shards:
            if shard not in seen[-1] and len(seen[-1]) == window:
                seen.append(set())
            seen[-1].add(shard)
        assert sum(len(part) for part in seen) == len(SHARDS), "a shard's images come in one window alone"
        count += len({tuple(sorted(part)) for part in seen})
    assert count > len(seen), "windows are other shards in other epochs"


def test_the_images_of_a_window_are_mixed():
    chain = window_chain(5)
    shards = INDEX.shard[chain.at(EVERY)]
    changes = (np.diff(shards) != 0).sum()
    assert changes > 0.5 * len(EVERY), "neighbours are of different shards more often than not"


def test_another_seed_and_another_epoch_are_other_orders():
    chain = window_chain(3)
    first = chain.at(EVERY).tolist()
    assert first == window_chain(3).at(EVERY).tolist()
    assert first != chain.at(chain.epoch + EVERY).tolist()
    assert first != window_chain(3, seed=4).at(EVERY).tolist()


def test_images_in_order_stay_in_order():
    assert Chain(INDEX, EVERY, shuffled=False).at(EVERY).tolist() == EVERY.tolist()
    assert Chain(INDEX, EVERY, shuffled=False, window=2).at(EVERY).tolist() == EVERY.tolist()


@pytest.mark.parametrize("window", [1, 3, None])
def test_the_place_of_a_bad_image_goes_to_the_next_good_one_of_its_window(window):
    chain = Chain(INDEX, EVERY, seed=1, window=window)
    random = np.random.default_rng(0)
    bad = random.random(len(EVERY)) < 0.4
    order = chain.at(EVERY).tolist()
    rank = {shard: i for i, shard in enumerate(shards_in_turn(chain))}
    windows = [rank[INDEX.shard[image]] // (window or len(SHARDS)) for image in order]
    for position in np.flatnonzero(bad[order]).tolist():
        after = [*range(position, chain.epoch), *range(position)]
        good = [order[i] for i in after if windows[i] == windows[position] and not bad[order[i]]]
        if good:
            assert chain.instead(position, bad) == good[0]
        else:
            assert not bad[chain.instead(position, bad)], "a window without a good image takes one of another"


def shards_in_turn(chain: Chain) -> list[int]:
    """The shards of the first epoch as they are announced, a window after the other."""
    announced = [shard for position in range(chain.epoch) for shard in chain.shards(position, position)]
    return list(dict.fromkeys(announced))


def test_without_a_good_image_there_is_none():
    assert window_chain(3).instead(4, EVERY >= 0) is None


@pytest.mark.parametrize("window", [1, 3, 4])
def test_announced_are_the_shards_of_the_positions_and_one_window_more(window):
    chain = window_chain(window)
    for first in range(0, 3 * chain.epoch, 5):
        positions = np.arange(first, first + 5)
        needed = set(INDEX.shard[chain.at(positions)].tolist())
        found = chain.shards(first, first + 4)
        assert needed <= set(found)
        assert len(found) <= (len(needed) // window + 3) * window
        assert len(found) == len(set(found))
        last_window = set(chain.shards(first + 4, first + 4)[:window])
        assert set(INDEX.shard[chain.at(positions[-1:])].tolist()) <= last_window


def test_a_mixture_gives_each_chain_its_share_of_every_turn_and_its_own_exact_epochs():
    sets = np.split(EVERY, [20, 30])
    chains = [Chain(INDEX, numbers, seed=2) for numbers in sets]
    mixture = Mixture(chains, [3, 1, 2], epoch=40, seed=2)
    numbers = mixture.at(np.arange(6000))
    which = np.searchsorted([20, 30], numbers, "right")
    for start in range(0, 6000, 6):
        assert np.bincount(which[start : start + 6], minlength=3).tolist() == [3, 1, 2]
    for chain, inside in enumerate(sets):
        seen = numbers[which == chain]
        for start in range(0, len(seen) - len(inside) + 1, len(inside)):
            assert sorted(seen[start : start + len(inside)].tolist()) == inside.tolist(), chain


def test_a_mixture_reads_at_any_position_what_it_reads_in_turn():
    chains = [Chain(INDEX, numbers, seed=2, window=2) for numbers in np.split(EVERY, [25])]
    mixture = Mixture(chains, [2, 1], epoch=30, seed=7)
    whole = mixture.at(np.arange(500))
    for first in (0, 3, 100, 401):
        assert mixture.at(np.arange(first, first + 17)).tolist() == whole[first : first + 17].tolist()


def test_a_mixture_replaces_a_bad_image_by_one_of_the_same_chain():
    sets = np.split(EVERY, [20])
    mixture = Mixture([Chain(INDEX, numbers, seed=2) for numbers in sets], [1, 1], epoch=40)
    bad = EVERY % 3 == 0
    numbers = mixture.at(np.arange(100))
    for position in np.flatnonzero(bad[numbers]).tolist():
        good = mixture.instead(position, bad)
        assert not bad[good]
        assert (good < 20) == (numbers[position] < 20)


def test_a_mixture_announces_the_windows_of_all_its_chains():
    chains = [Chain(INDEX, numbers, seed=2, window=2) for numbers in np.split(EVERY, [25])]
    mixture = Mixture(chains, [2, 1], epoch=30, seed=7)
    for first in range(0, 200, 7):
        needed = set(INDEX.shard[mixture.at(np.arange(first, first + 7))].tolist())
        assert needed <= set(mixture.shards(first, first + 6))


def test_a_selection_keeps_to_its_images():
    some = np.array([5, 50, 7, 30])
    chain = Chain(INDEX, some, seed=0, window=1)
    for epoch in range(3):
        assert sorted(chain.at(4 * epoch + np.arange(4)).tolist()) == sorted(some.tolist())
    assert set(chain.shards(0, 3)) == set(INDEX.shard[some].tolist())


def test_weights_are_taken_in_lowest_terms():
    chains = [Chain(INDEX, numbers, seed=2) for numbers in np.split(EVERY, [25])]
    first, second = (Mixture(chains, weights, epoch=40, seed=2) for weights in ([3, 1], [30_000, 10_000]))
    assert first.at(np.arange(100)).tolist() == second.at(np.arange(100)).tolist()
