import numpy as np
import pytest
from conftest import picture_folder

from mpp.augment.config import AugmentConfig
from mpp.data.config import SubsetConfig
from mpp.data.read import read_shards
from mpp.data.subset import drawn
from mpp.shards.classes import lacking
from mpp.shards.index import ShardError, read_index
from mpp.shards.write import make_shards


def shards(root, counts: dict[str, int], per_shard: int = 30):
    """Shards of a class for each name, with so many images."""
    for name, count in counts.items():
        folder = picture_folder(root / "made" / name, count, classes=1) / "class0"
        folder.parent.parent.joinpath("source/train").mkdir(parents=True, exist_ok=True)
        folder.rename(root / "made" / "source" / "train" / name)
    make_shards(
        root / "made" / "source", root / "shards", per_shard=per_shard, report=lambda line: None, progress=False
    )
    return root / "shards"


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Classes of 60, 30 and 3 images."""
    return shards(tmp_path_factory.mktemp("uneven"), {"a": 60, "b": 30, "c": 3})


def counts(index, numbers) -> list[int]:
    return np.bincount(index.label[numbers], minlength=3).tolist()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"share": 0.1}, [6, 3, 1]),
        ({"share": 0.5}, [30, 15, 2]),
        ({"share": 1e-9}, [1, 1, 1]),
        ({"per_class": 1}, [1, 1, 1]),
        ({"per_class": 10}, [10, 10, 3]),
        ({}, [60, 30, 3]),
    ],
)
def test_every_class_gives_its_share(uneven, config, expected):
    index = read_index(uneven, "train")
    chosen, held = drawn(index, SubsetConfig(**config), seed=0)
    assert counts(index, chosen) == expected
    assert not len(held)
    assert (np.diff(chosen) > 0).all(), "each once"


def test_smaller_shares_lie_within_larger_ones_and_seeds_differ(uneven):
    index = read_index(uneven, "train")
    small, large = (set(drawn(index, SubsetConfig(share=share), 3)[0].tolist()) for share in (0.2, 0.4))
    assert small < large
    other = set(drawn(index, SubsetConfig(share=0.2), 4)[0].tolist())
    assert len(small & other) < len(small)


def test_held_out_images_are_of_every_class_and_not_trained_on(uneven):
    index = read_index(uneven, "train")
    whole, _ = drawn(index, SubsetConfig(share=0.5), 0)
    fit, held = drawn(index, SubsetConfig(share=0.5, hold_out=0.2), 0)
    assert counts(index, held) == [6, 3, 1]
    assert sorted([*fit, *held]) == whole.tolist()


def test_a_class_of_one_image_is_trained_on_and_not_held_out(uneven):
    index = read_index(uneven, "train")
    with pytest.raises(ShardError, match=r"hold_out needs a class of at least 2 images"):
        drawn(index, SubsetConfig(per_class=1, hold_out=0.5), 0)
    fit, held = drawn(index, SubsetConfig(share=0.1, hold_out=0.3), 0)
    assert counts(index, fit)[2] == 1
    assert counts(index, held)[2] == 0


def test_the_draw_depends_on_keys_alone_not_on_how_shards_are_cut(tmp_path):
    one, other = shards(tmp_path / "1", {"a": 20, "b": 20}, 7), shards(tmp_path / "2", {"a": 20, "b": 20}, 40)
    found = []
    for folder in (one, other):
        index = read_index(folder, "train")
        found.append({index.key(i) for i in drawn(index, SubsetConfig(share=0.3), 5)[0].tolist()})
    assert found[0] == found[1]
    assert len(found[0]) == 12


def test_a_selection_reads_the_same_images_in_its_order(uneven):
    index, numbers = read_index(uneven, "train"), np.array([70, 3, 41])
    chosen = index.select(numbers)
    assert [chosen.key(i) for i in range(3)] == [index.key(i) for i in numbers]
    whole = read_shards(uneven, 93, train=False).at(0)
    part = read_shards(uneven, 3, train=False, numbers=numbers).at(0)
    assert (part.images == whole.images[numbers]).all()
    assert (part.labels == whole.labels[numbers]).all()


def test_training_reads_the_selection_once_an_epoch(uneven):
    numbers = np.array([1, 2, 33, 62, 92])
    batches = read_shards(uneven, 5, numbers=numbers, augment=AugmentConfig(crop="none", flip=False))
    pictures = {image.numpy().tobytes() for image in read_shards(uneven, 93, train=False).at(0).images[numbers]}
    for step in (0, 1):
        assert {image.numpy().tobytes() for image in batches.at(step).images} == pictures


def test_shards_without_labels_are_refused(tmp_path):
    source = picture_folder(tmp_path / "source", 8)
    make_shards(source, tmp_path / "plain", labels="none", report=lambda line: None, progress=False)
    with pytest.raises(ShardError, match="has no labels"):
        drawn(read_index(tmp_path / "plain", "train"), SubsetConfig(), 0)


def test_classes_that_only_the_scored_images_have_are_named(uneven):
    index = read_index(uneven, "train")
    without = index.select(np.flatnonzero(index.label != 1))
    assert lacking(without, index) == ["b"]
    assert lacking(index, without) == []


@pytest.mark.parametrize("config", [{"share": 0.0}, {"share": 1.5}, {"per_class": 0}, {"hold_out": 1.0}])
def test_impossible_settings_are_named(config):
    with pytest.raises(ValueError, match=f"data.subset.{next(iter(config))}"):
        SubsetConfig(**config)
