"""Several views of an image: each drawn on its own, all made of one decoding, the first as if it were the only one."""

import shutil
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import pictures
from http_server import File, serving
from PIL import Image

from mpp.augment.config import AugmentConfig
from mpp.augment.plan import apply, training_plan
from mpp.batch import Batch
from mpp.data.batches import Batches
from mpp.data.config import DataConfig, View, ViewConfig
from mpp.data.on_device import Decoded, Kept
from mpp.data.read import open_batches, read_shards
from mpp.decode import decode
from mpp.seeds import permutation, seed_of
from mpp.shards import pictures as reading
from mpp.shards.index import read_index
from mpp.shards.write import make_shards

PLAIN = AugmentConfig(crop="none", flip=False)
SHIFTED = AugmentConfig(crop="shift")
STRONG = AugmentConfig(jitter=(0.4, 0.4, 0.2, 0.1), grey=0.2, blur=0.5, solarize=0.2, randaugment=2, erase=0.5)
WORD = int.from_bytes(b"views", "big")  # between seed and view in the seed of a view
# Views 1, 2 and 3: one like the first, and two that are small and strongly augmented.
VIEWS = {"twin": ViewConfig(), "small": ViewConfig(count=2, image=(8, 12), augment=STRONG)}
SIZES = [(16, 16), (8, 12), (8, 12)]


def equal(first: Batch, second: Batch) -> bool:
    """Whether two batches hold the same, view by view."""
    pairs = zip(first.all_views, second.all_views, strict=True)
    return all(torch.equal(*pair) for pair in pairs) and torch.equal(first.labels, second.labels)


def made(pixels: np.ndarray, augment: AugmentConfig, size: tuple[int, int], seed: int, position: int) -> torch.Tensor:
    """One picture (c, h, w) of one image, of a plan of its own."""
    plan = training_plan(augment, np.array([pixels.shape[:2]]), size, seed, np.array([position]))
    picture = np.empty((*size, 3), np.uint8)
    apply(pixels, plan.boxes[0], plan.flips[0], plan.shifts[0], picture, plan.changes and plan.changes[0])
    return torch.from_numpy(picture).permute(2, 0, 1)


def pixels_of(batches: Batches, number: int) -> np.ndarray:
    index = batches.index
    data = (index.folder / index.shards[index.shard[number]]).read_bytes()
    return decode(data[index.offset[number] : index.offset[number] + index.size[number]])


def damage(shards, numbers: list[int]) -> None:
    """Overwrites images in their tars, which keep their size."""
    index = read_index(shards, "train")
    for number in numbers:
        path = shards / index.shards[index.shard[number]]
        data = bytearray(path.read_bytes())
        data[index.offset[number] : index.offset[number] + 64] = bytes(64)
        path.write_bytes(data)


@pytest.mark.parametrize("train", [True, False])
def test_the_first_view_and_the_labels_are_those_of_a_reading_without_views(small_shards, train):
    alone = read_shards(small_shards, 10, seed=2, train=train, augment=STRONG)
    several = read_shards(small_shards, 10, seed=2, train=train, augment=STRONG, views=VIEWS)
    for step in range(6):
        one, all_of_them = alone.at(step), several.at(step)
        assert equal(one, Batch(all_of_them.images, all_of_them.labels))
        assert [tuple(view.shape) for view in all_of_them.views] == [(len(one), 3, *size) for size in SIZES]
        assert {view.dtype for view in all_of_them.views} == {torch.uint8}
        assert one.views == ()


@pytest.mark.parametrize("train", [True, False])
def test_a_view_is_what_its_seed_view_and_position_draw(small_shards, train):
    batches = read_shards(small_shards, 10, seed=7, train=train, augment=SHIFTED, views=VIEWS)
    augments = [SHIFTED, STRONG, STRONG]
    for step in (0, 5):  # the sixth batch reaches into the second epoch, in evaluation it is the short one
        batch = batches.at(step)
        for place in range(len(batch)):
            position = 10 * step + place
            number = permutation(53, 7, position // 53)[position % 53] if train else position
            for view, (augment, size) in enumerate(zip(augments, SIZES, strict=True), 1):
                expected = made(pixels_of(batches, number), augment, size, seed_of(7, WORD, view), position)
                assert torch.equal(batch.views[view - 1][place], expected)


def test_views_of_one_image_differ_even_where_they_are_made_alike(small_shards):
    views = {"more": ViewConfig(count=3)}
    batch = read_shards(small_shards, 53, seed=1, augment=AugmentConfig(area=(0.3, 1.0)), views=views).at(0)
    for number, one in enumerate(batch.all_views):
        for other in batch.all_views[number + 1 :]:
            assert (one != other).flatten(1).any(1).all(), "for every image"


def test_other_seeds_draw_other_views_of_the_same_image(small_shards):
    first, second = (
        read_shards(small_shards, 53, seed=seed, train=False, views={"more": ViewConfig()}) for seed in (1, 2)
    )
    assert torch.equal(first.at(0).images, second.at(0).images), "the centre, whatever the seed"
    assert (first.at(0).views[0] != second.at(0).views[0]).flatten(1).any(1).all()


@pytest.mark.parametrize("train", [True, False])
def test_a_plain_view_shows_the_image_of_its_row(small_shards, train):
    batches = read_shards(small_shards, 10, seed=1, train=train, augment=PLAIN, views={"same": ViewConfig()})
    for step in range(6):
        assert torch.equal(batches.at(step).images, batches.at(step).views[0])


@pytest.mark.parametrize("settings", [{}, {"shuffle": "window", "window": 1}, {"sampling": "classes"}], ids=str)
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("reader", ["resident", "indexed"])
@pytest.mark.parametrize("threads", [1, 3])
def test_neither_threads_nor_readers_nor_ranks_change_a_view(small_shards, settings, train, reader, threads):
    settings = {"seed": 4, "train": train, "views": VIEWS, "augment": STRONG} | settings
    alone = read_shards(small_shards, 10, reader="indexed", threads=1, **settings)
    ranks = [
        read_shards(small_shards, 10, rank=r, ranks=3, reader=reader, threads=threads, **settings) for r in (0, 1, 2)
    ]
    for step in (0, 5, 13) if train else (0, 5):
        parts = [batches.at(step) for batches in ranks]
        views = [torch.cat(view) for view in zip(*(part.all_views for part in parts), strict=True)]
        assert equal(alone.at(step), Batch(views[0], torch.cat([part.labels for part in parts]), tuple(views[1:])))


@pytest.mark.parametrize("last_batch", ["chained", "kept", "dropped"])
def test_a_run_that_goes_on_from_any_step_gets_the_same_views(small_shards, last_batch):
    settings = {"seed": 4, "views": VIEWS, "last_batch": last_batch}
    expected = list(islice(read_shards(small_shards, 10, **settings).iterate(), 12))
    assert {len(batch) for batch in expected} == ({3, 10} if last_batch == "kept" else {10})
    for start in (0, 3, 5, 6, 11):
        fresh = read_shards(small_shards, 10, threads=2, **settings)
        found = list(islice(fresh.iterate(start), 12 - start))
        assert all(equal(*pair) for pair in zip(expected[start:], found, strict=True))


def test_views_of_shards_by_url_are_those_of_local_ones(small_shards, tmp_path):
    settings = {"seed": 6, "shuffle": "window", "window": 1, "views": VIEWS}
    local = read_shards(small_shards, 10, **settings)
    with serving() as server:
        for path in sorted(small_shards.iterdir()):
            url = server.put(f"shards/{path.name}", File(path.read_bytes()))
        streamed = read_shards(url.rpartition("/")[0], 10, cache=str(tmp_path / "cache"), **settings)
        assert all(equal(local.at(step), streamed.at(step)) for step in range(12))
        streamed.close()


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("reader", ["resident", "indexed"])
def test_an_image_is_decoded_once_a_batch_whatever_the_number_of_views(small_shards, monkeypatch, train, reader):
    decoded = []
    for name in ("decode_first", "decode_again"):
        real = getattr(reading, name)
        monkeypatch.setattr(reading, name, lambda *given, real=real: decoded.append(given[0]) or real(*given))
    batches = read_shards(small_shards, 10, train=train, reader=reader, threads=1, views=VIEWS)
    for step in (0, 1, 0):
        batches.at(step)
    assert len(decoded) == (20 if reader == "resident" else 30)


def test_as_much_of_a_photograph_is_decoded_as_any_of_its_views_needs(tmp_path):
    (tmp_path / "source").mkdir()
    for number, picture in enumerate(pictures(4, (400, 100))):
        Image.fromarray(picture).save(tmp_path / f"source/{number}.jpg")
    make_shards(tmp_path / "source", tmp_path / "shards", report=lambda line: None, progress=False)
    small = AugmentConfig(area=(0.05, 0.2))
    settings = {"image": (32, 32), "augment": small, "views": {"more": ViewConfig(count=2)}, "train": True}
    resident, indexed = (
        read_shards(tmp_path / "shards", 4, reader=kind, **settings) for kind in ("resident", "indexed")
    )
    for step in range(8):  # from the second epoch on, photographs are decoded down to the end of their crops
        views = zip(resident.at(step).all_views, indexed.at(step).all_views, strict=True)
        assert all(torch.equal(*pair) for pair in views)


@pytest.mark.parametrize("reader", ["resident", "indexed"])
@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_a_damaged_image_is_replaced_by_the_same_one_in_all_views(small_shards, tmp_path, reader, device):
    shards, order = shutil.copytree(small_shards, tmp_path / "shards"), permutation(53, 3, 0)
    damage(shards, order[[3, 4, 20]].tolist())
    config = DataConfig(str(shards), augment=PLAIN, reader=reader, views={"same": ViewConfig(count=2)})
    batches = open_batches([read_index(shards, "train")], 10, config, seed=3, device=device)
    first = batches.at(0)
    assert torch.equal(first.images[3], first.images[5]), "the next good one of the epoch"
    for step in range(6):
        batch = batches.at(step)
        assert all(torch.equal(view, batch.images) for view in batch.views)
    assert batches.damaged.keys() == set(order[[3, 4, 20]].tolist())


def test_a_damaged_image_changes_no_view_of_another_one(small_shards, tmp_path):
    shards = shutil.copytree(small_shards, tmp_path / "shards")
    damage(shards, [4])
    settings = {"seed": 3, "train": False, "views": VIEWS}
    whole, rest = read_shards(small_shards, 10, **settings).at(0), read_shards(shards, 10, **settings).at(0)
    others = [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert all(torch.equal(a[others], b) for a, b in zip(whole.all_views, rest.all_views, strict=True))


def test_each_view_has_its_own_size_and_augmentation_or_that_of_the_first(small_shards):
    views = {"own": ViewConfig(image=(20, 10), augment=PLAIN), "gone": None, "like": ViewConfig(2)}
    config = DataConfig("shards", augment=SHIFTED, views=views)
    assert config.further_views((16, 24)) == (View((20, 10), PLAIN), *[View((16, 24), SHIFTED)] * 2)
    config = DataConfig(str(small_shards), augment=SHIFTED, views=views)
    batch = open_batches([read_index(small_shards, "train")], 4, config, image=(16, 24), seed=1).at(0)
    assert [tuple(view.shape[2:]) for view in batch.all_views] == [(16, 24), (20, 10), (16, 24), (16, 24)]


@pytest.mark.parametrize("reader", ["resident", "indexed"])
@pytest.mark.parametrize("train", [True, False])
def test_views_made_on_a_device_are_drawn_alike(small_shards, reader, train):
    views = {"twin": ViewConfig(), "small": ViewConfig(2, (8, 12), AugmentConfig(area=(0.1, 0.5)))}
    config = DataConfig(str(small_shards), augment=SHIFTED, reader=reader, views=views)
    on_cpu, on_device = (
        open_batches([read_index(small_shards, "train")], 10, config, seed=3, train=train, device=device)
        for device in (None, torch.device("cpu"))
    )
    assert isinstance(on_device._source, Kept if reader == "resident" else Decoded)
    for step in range(6):
        ours, theirs = on_cpu.at(step), on_device.at(step)
        assert torch.equal(ours.labels, theirs.labels)
        for one, other in zip(ours.all_views, theirs.all_views, strict=True):
            assert one.shape == other.shape
            assert (one.int() - other.int()).abs().max() <= 1


def test_a_batch_that_is_all_damaged_has_empty_views_on_a_device_too(small_shards, tmp_path):
    shards = shutil.copytree(small_shards, tmp_path / "shards")
    damage(shards, list(range(10)))
    config = DataConfig(str(shards), views=VIEWS)
    for device in (None, torch.device("cpu")):
        batch = open_batches([read_index(shards, "train")], 10, config, train=False, device=device).at(0)
        assert [tuple(view.shape) for view in batch.all_views] == [(0, 3, *size) for size in [(16, 16), *SIZES]]


@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_evaluation_sees_the_same_views_every_time(small_shards, device):
    config = DataConfig(str(small_shards), augment=STRONG, views=VIEWS)
    first, second = (
        open_batches([read_index(small_shards, "train")], 10, config, seed=3, train=False, device=device)
        for _ in range(2)
    )
    once, twice, again = list(first.iterate()), list(first.iterate()), list(second.iterate())
    assert sum(map(len, once)) == 53
    assert all(equal(a, b) and equal(a, c) for a, b, c in zip(once, twice, again, strict=True))


def test_a_batch_takes_its_views_along():
    images, labels = torch.arange(7 * 3 * 4 * 4).view(7, 3, 4, 4), torch.arange(7)
    batch = Batch(images, labels, (images[:, :, :2] + 1, images[..., :1] + 2))
    parts = list(batch.split(3))
    assert [len(part) for part in parts] == [3, 3, 1]
    assert equal(parts[1], Batch(images[3:6], labels[3:6], (images[3:6, :, :2] + 1, images[3:6, ..., :1] + 2)))
    moved = batch.to(torch.device("meta"))
    assert [view.device.type for view in moved.all_views] == ["meta"] * 3
    assert moved.labels.device.type == "meta"
    assert next(Batch(images).split(2)).all_views[0].equal(images[:2])


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (ViewConfig(count=0), r"data\.views\.crops\.count must be at least 1 and at most 1000, got 0"),
        (ViewConfig(count=2**60), r"data\.views\.crops\.count must be at least 1 and at most 1000, got 11529"),
        (ViewConfig(image=(0, 8)), r"data\.views\.crops\.image must be two sides of at least 1 pixel, .* got \(0, 8\)"),
        (ViewConfig(image=(8,)), r"data\.views\.crops\.image must be two sides of at least 1 pixel, .* got \(8,\)"),
        (ViewConfig(image=(2**15, 2**14)), r"data\.views\.crops\.image must be two sides .* at most 2 \*\* 28 in all"),
    ],
)
def test_views_that_cannot_be_made_are_refused_by_name(view, message):
    with pytest.raises(ValueError, match=message) as caught:
        DataConfig("shards", views={"crops": view})
    assert "\n" not in str(caught.value)


def test_settings_import_neither_torch_nor_opencv():
    import subprocess
    import sys

    code = "import mpp.data.config, sys; print([name for name in ('torch', 'cv2', 'numpy') if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"
