"""Exact epochs whatever the ranks, threads and interruptions: every image is counted."""

import itertools
import os
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import picture_folder, pictures
from PIL import Image

from mpp.augment.config import AugmentConfig
from mpp.data.batches import Batches
from mpp.data.config import DataConfig, MixConfig
from mpp.data.read import open_batches, read_shards
from mpp.shards.index import ShardError, read_index
from mpp.shards.write import make_shards

PLAIN = AugmentConfig(crop="none", flip=False)
BATCH = 10
SETTINGS = [
    {"shuffle": "all"},
    {"shuffle": "window", "window": 1},
    {"shuffle": "window", "window": 2},
    {"last_batch": "kept"},
    {"last_batch": "dropped"},
    {"sampling": "classes"},
]


def digest(batches: Batches, steps: range) -> list[list[bytes]]:
    """The pictures of each step."""
    return [[image.numpy().tobytes() for image in batches.at(step).images] for step in steps]


def seen(found: list[list[bytes]]) -> Counter[bytes]:
    return Counter(itertools.chain.from_iterable(found))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_the_images_of_a_step_are_the_same_on_any_number_of_ranks(small_shards, settings, ranks):
    alone = read_shards(small_shards, BATCH, seed=4, **settings)
    several = [
        read_shards(small_shards, BATCH, seed=4, rank=r, ranks=ranks, threads=1 + r % 2, **settings)
        for r in range(ranks)
    ]
    assert {len(batches) for batches in several} == {len(alone)}, "as many steps on every rank"
    for step in (0, 4, 5, 6, 13):
        parts = [batches.at(step) for batches in several]
        whole = alone.at(step)
        assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
        assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("settings", SETTINGS[:3], ids=str)
def test_a_run_that_goes_on_at_another_world_size_skips_and_repeats_nothing_in_two_epochs(small_shards, settings):
    total = 2 * 53  # images of two epochs, on the 11th batch
    found: list[bytes] = []
    for steps, ranks in ((range(0, 3), 1), (range(3, 4), 8), (range(4, 9), 3), (range(9, 11), 2)):
        readers = [
            read_shards(small_shards, BATCH, seed=1, augment=PLAIN, rank=r, ranks=ranks, **settings)
            for r in range(ranks)
        ]
        for step in steps:
            for reader in readers:
                found += [image.numpy().tobytes() for image in reader.at(step).images]
    for epoch in (0, 1):
        counts = Counter(found[53 * epoch : 53 * (epoch + 1)])
        assert len(counts) == 53
        assert set(counts.values()) == {1}
    assert len(found) == 110 > total


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("reader", ["resident", "indexed"])
def test_neither_threads_nor_readers_change_a_window_shuffle(small_shards, threads, reader):
    settings = {"seed": 2, "shuffle": "window", "window": 2}
    expected = digest(read_shards(small_shards, BATCH, reader="indexed", threads=1, **settings), range(12))
    assert digest(read_shards(small_shards, BATCH, reader=reader, threads=threads, **settings), range(12)) == expected


def test_iterating_from_the_middle_of_an_epoch_gives_the_same_batches(small_shards):
    batches = read_shards(small_shards, BATCH, seed=2, shuffle="window", window=1)
    expected = digest(batches, range(7, 13))
    fresh = read_shards(small_shards, BATCH, seed=2, shuffle="window", window=1)
    found = [[image.numpy().tobytes() for image in batch.images] for batch in itertools.islice(fresh.iterate(7), 6)]
    assert found == expected


def test_a_short_last_batch_is_kept(small_shards):
    batches = read_shards(small_shards, BATCH, augment=PLAIN, last_batch="kept")
    assert len(batches) == 6
    assert [len(batches.at(step)) for step in range(12)] == [10, 10, 10, 10, 10, 3] * 2
    for epoch in (0, 1):
        counts = seen(digest(batches, range(6 * epoch, 6 * epoch + 6)))
        assert (len(counts), set(counts.values())) == (53, {1})


def test_a_short_last_batch_is_dropped(small_shards):
    batches = read_shards(small_shards, BATCH, augment=PLAIN, last_batch="dropped")
    assert len(batches) == 5
    assert {len(batches.at(step)) for step in range(10)} == {10}
    first, second = (seen(digest(batches, range(start, start + 5))) for start in (0, 5))
    assert len(first) == len(second) == 50
    assert set(first) != set(second), "another three are left out"
    with pytest.raises(ShardError, match="53 images make no batch of 54"):
        read_shards(small_shards, 54, last_batch="dropped")


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_evaluation_sees_each_image_once_on_any_number_of_ranks(small_shards, ranks):
    readers = [read_shards(small_shards, BATCH, train=False, rank=r, ranks=ranks) for r in range(ranks)]
    found = [list(reader.iterate()) for reader in readers]
    assert {len(batches) for batches in found} == {6}, "as many batches on every rank, some of them empty"
    in_order = [part[step].images for step in range(6) for part in found]
    expected = torch.cat([batch.images for batch in read_shards(small_shards, 53, train=False).iterate()])
    assert torch.equal(torch.cat(in_order), expected)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Three classes of 20, 6 and 3 images."""
    root = tmp_path_factory.mktemp("uneven")
    for label, count in enumerate((20, 6, 3)):
        place = root / "source" / f"class{label}"
        place.mkdir(parents=True)
        for number, picture in enumerate(pictures(count, seed=label)):
            Image.fromarray(picture).save(place / f"{number}.png")
    make_shards(root / "source", root / "shards", per_shard=8, report=lambda line: None, progress=False)
    return root / "shards"


def test_balanced_sampling_shows_each_class_equally_often_and_each_of_its_images(uneven):
    batches = read_shards(uneven, 6, augment=PLAIN, sampling="classes")
    labels = torch.cat([batches.at(step).labels for step in range(20)])  # 120 positions, 40 a class
    assert labels.bincount().tolist() == [40, 40, 40]
    assert labels.view(-1, 3).sort(1).values.unique(dim=0).tolist() == [[0, 1, 2]], "each once in three positions"
    counts = seen(digest(batches, range(20)))
    assert sorted(counts.values()) == [2] * 20 + [6] * 2 + [7] * 4 + [13] * 2 + [14]
    assert len(batches) == 5, "an epoch has as many positions as there are images"


def test_balanced_sampling_needs_labels_and_all_shards_at_once(tmp_path, uneven):
    picture_folder(tmp_path / "source", 4, classes=1)
    make_shards(tmp_path / "source", tmp_path / "shards", labels="none", report=lambda line: None, progress=False)
    with pytest.raises(ShardError, match="has no labels; data.sampling: classes needs some"):
        read_shards(tmp_path / "shards", 2, sampling="classes")
    with pytest.raises(ValueError, match=r"data\.sampling: classes .* does not go with data\.shuffle: window"):
        read_shards(uneven, 2, sampling="classes", shuffle="window")


def test_data_sets_are_mixed_by_weight_each_with_its_own_exact_epochs(small_shards, uneven):
    config = DataConfig(str(small_shards), weight=2, mix={"more": MixConfig(str(uneven))}, augment=PLAIN)
    indexes = [read_index(small_shards, "train"), read_index(uneven, "train")]
    batches = open_batches(indexes, 12, config, image=(16, 16), seed=3)
    assert batches.epoch == 80  # 53 images of the first, and one for two of them of the second
    own = {image.numpy().tobytes() for image in read_shards(uneven, 29, train=False).at(0).images}
    found = list(itertools.chain.from_iterable(digest(batches, range(40))))  # 480 positions
    assert [sum(image in own for image in found[start : start + 3]) for start in range(0, 480, 3)] == [1] * 160
    for part, size in (([i for i in found if i in own], 29), ([i for i in found if i not in own], 53)):
        for start in range(0, len(part) - size, size):
            assert len(set(part[start : start + size])) == size
    assert batches.at(0).labels is None, "their classes are not the same"


def test_mixed_data_sets_may_be_named_by_relative_paths(small_shards, uneven, monkeypatch):
    monkeypatch.chdir(small_shards.parent.parent)
    paths = [os.path.relpath(path) for path in (small_shards, uneven)]
    config = DataConfig(paths[0], mix={"more": MixConfig(paths[1])}, reader="indexed")
    batches = open_batches([read_index(path, "train") for path in paths], 12, config)
    assert len(batches.at(0)) == 12
    assert not batches.damaged


def test_labels_stay_where_mixed_data_sets_have_the_same_classes(uneven):
    config = DataConfig(str(uneven), mix={"again": MixConfig(str(uneven))}, augment=PLAIN)
    index = read_index(uneven, "train")
    batches = open_batches([index, index], 29, config)
    pairs = Counter(
        zip((i.numpy().tobytes() for i in batches.at(0).images), batches.at(0).labels.tolist(), strict=True)
    )
    whole = read_shards(uneven, 29, train=False).at(0)
    known = dict(zip((i.numpy().tobytes() for i in whole.images), whole.labels.tolist(), strict=True))
    assert all(known[image] == label for image, label in pairs)


def test_one_set_of_a_mixture_may_be_grey_only_if_all_are(tmp_path, small_shards):
    picture_folder(tmp_path / "source", 4)
    make_shards(tmp_path / "source", tmp_path / "grey", mode="L", report=lambda line: None, progress=False)
    config = DataConfig(str(small_shards), mix={"grey": MixConfig(str(tmp_path / "grey"))})
    with pytest.raises(ShardError, match="cannot be mixed"):
        open_batches([read_index(small_shards, "train"), read_index(tmp_path / "grey", "train")], 4, config)


def test_a_thread_that_fails_ends_the_run_at_once(small_shards, monkeypatch):
    batches = read_shards(small_shards, BATCH, threads=3, reader="indexed")

    def broken(data: bytes, mode: str) -> np.ndarray:
        raise ZeroDivisionError("a bug in a decoder")

    monkeypatch.setattr("mpp.shards.pictures.decode_first", broken)
    with pytest.raises(ZeroDivisionError, match="a bug in a decoder"):
        next(batches.iterate())
