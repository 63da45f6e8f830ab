"""What the `data` section of a recipe chooses: held-out shares that last, mixtures, and what is scored."""

import zlib

import numpy as np
import pytest
from conftest import picture_folder
from shard_files import labelled, write_tar

from mpp.data.chosen import chosen
from mpp.data.config import DataConfig, MixConfig, SubsetConfig
from mpp.data.subset import held_out
from mpp.shards.build import index_folder
from mpp.shards.index import Index, ShardError, read_index
from mpp.shards.write import make_shards


def make(source, out) -> str:
    make_shards(source, out, per_shard=20, report=lambda line: None, progress=False)
    return str(out)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    """Splits train and test of 80 and 20 images in two classes."""
    root = tmp_path_factory.mktemp("chosen")
    picture_folder(root / "source/train", 80)
    picture_folder(root / "source/test", 20)
    return make(root / "source", root / "shards")


def keys(index: Index) -> list[str]:
    return [index.key(i) for i in range(len(index))]


def names_of(index: Index) -> list[str]:
    return [index.classes[label] for label in index.label.tolist()]


def splitmix(word: int) -> int:
    """SplitMix64's output function, one word at a time."""
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
    return word ^ (word >> 31)


def share_of(key: str) -> float:
    """What docs/data.md says of data.hold_out, written out: an image is held out if this is below the share."""
    golden, word = 0x9E3779B97F4A7C15, 0
    for part in (3, zlib.crc32(key.encode())):
        word = splitmix((word + golden) % 2**64 ^ splitmix((part + golden) % 2**64))
    return word / 2**64


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_held_out_share_is_a_hash_of_the_key_alone(shards, share):
    whole = read_index(shards, "train")
    expected = {key for key in keys(whole) if share_of(key) < share}
    for seed in (0, 1):
        (train,), scored = chosen(DataConfig(shards, hold_out=share, val="test"), seed, labelled=False)
        assert set(keys(scored)) == expected
        assert set(keys(train)) == set(keys(whole)) - expected
    assert abs(len(expected) / 80 - share) < 0.15


def test_what_is_held_out_stays_so_when_images_are_added_and_shards_cut_anew(tmp_path):
    """Made from folders, the keys are those of the names; so a picture more moves no other one."""
    before = read_index(make(picture_folder(tmp_path / "source", 40), tmp_path / "a"), "train")
    picture_folder(tmp_path / "source", 60)
    after = read_index(make(tmp_path / "source", tmp_path / "b"), "train")
    assert set(keys(before)) < set(keys(after))
    first, second = (
        {key for key, held in zip(keys(i), held_out(i, 0.3), strict=True) if held} for i in (before, after)
    )
    assert first == second & set(keys(before))
    assert 0 < len(first) < len(second)


def test_larger_shares_hold_out_what_smaller_ones_do(shards):
    index = read_index(shards, "train")
    small, large = held_out(index, 0.2), held_out(index, 0.4)
    assert (large[small]).all()
    assert not held_out(index, 0.0).any()


def test_a_share_that_leaves_nothing_is_one_line(shards):
    with pytest.raises(ShardError, match=r"data\.hold_out 1e-09 holds out 0 of 80 images; expected some, not all"):
        chosen(DataConfig(shards, hold_out=1e-9), 0, labelled=False)


def test_without_a_hold_out_the_split_is_scored(shards):
    (train,), scored = chosen(DataConfig(shards, val="test"), 0, labelled=False)
    assert (len(train), len(scored)) == (80, 20)
    assert chosen(DataConfig(shards), 0, labelled=False)[1] is None


def test_labels_are_drawn_from_what_is_not_held_out(shards):
    config = DataConfig(shards, hold_out=0.3, subset=SubsetConfig(per_class=5))
    (train,), scored = chosen(config, 0, labelled=True)
    assert np.bincount(train.label).tolist() == [5, 5]
    assert not set(keys(train)) & set(keys(scored))
    assert len(scored) == sum(share_of(key) < 0.3 for key in keys(read_index(shards, "train")))


def test_two_ways_to_hold_out_are_refused(shards):
    with pytest.raises(ValueError, match=r"data\.hold_out and data\.subset\.hold_out: give one"):
        DataConfig(shards, hold_out=0.1, subset=SubsetConfig(hold_out=0.1))


def test_with_labels_mixed_data_sets_must_have_no_other_classes(shards, tmp_path):
    write_tar(tmp_path / "train-0.tar", labelled(6, ["class0", "other"]))
    index_folder(tmp_path)
    config = DataConfig(shards, mix={"more": MixConfig(str(tmp_path))})
    (first, second), _ = chosen(config, 0, labelled=False)
    assert (len(first), len(second)) == (80, 6)
    message = r"data\.mix\.more: has 2 classes \(class0, other\), expected those of data\.path \(class0, class1\)"
    with pytest.raises(ShardError, match=message + "; it has images of class other$"):
        chosen(config, 0, labelled=True)
    classes = ("other", "class1", "class0")
    (first, second), _ = chosen(config, 0, labelled=True, classes=classes)
    assert [first.classes, second.classes] == [classes, classes]
    assert names_of(second) == ["class0", "other"] * 3
    assert sorted(set(names_of(first))) == ["class0", "class1"]


def test_with_labels_mixed_and_scored_classes_are_matched_by_name(shards, tmp_path):
    write_tar(tmp_path / "train-0.tar", labelled(3, ["class1"]))
    index_folder(tmp_path)
    (tmp_path / "more").mkdir()
    write_tar(tmp_path / "more/train-0.tar", labelled(4, ["z", "class1"]))
    index_folder(tmp_path / "more")
    config = DataConfig(str(tmp_path / "more"), mix={"more": MixConfig(str(tmp_path))})
    (first, second), _ = chosen(config, 0, labelled=True)
    assert first.classes == second.classes == ("class1", "z")
    assert names_of(second) == ["class1"] * 3
    assert second.label.tolist() == [0, 0, 0]


def test_with_labels_images_without_one_are_left_out_everywhere(shards, tmp_path):
    write_tar(tmp_path / "train-0.tar", [*labelled(6, ["class0", "class1"]), ("x.png", labelled(1, [""])[0][1])])
    index_folder(tmp_path)
    config = DataConfig(shards, mix={"more": MixConfig(str(tmp_path))})
    assert [len(index) for index in chosen(config, 0, labelled=False)[0]] == [80, 7]
    assert [len(index) for index in chosen(config, 0, labelled=True)[0]] == [80, 6]


def test_a_selection_has_the_keys_of_its_images(shards):
    index = read_index(shards, "train")
    some = np.array([7, 0, 79, 3])
    assert keys(index.select(some)) == [index.key(i) for i in some]
    assert keys(index.select(some[:0])) == []


def test_weights_that_make_a_turn_too_long_are_refused(shards):
    with pytest.raises(ValueError, match=r"\[1281167, 50000\]; write them shorter"):
        DataConfig(shards, weight=1281167, mix={"more": MixConfig(shards, weight=50_000)})
    DataConfig(shards, weight=10**12, mix={"more": MixConfig(shards, weight=2 * 10**12)})
