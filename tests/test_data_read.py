import os
import shutil
import threading

import numpy as np
import pytest
import torch
from conftest import picture_folder
from PIL import Image

from mpp.augment.config import AugmentConfig
from mpp.data.read import read_shards
from mpp.decode import decode
from mpp.seeds import permutation
from mpp.shards.index import ShardError, read_index
from mpp.shards.write import make_shards
from mpp.workers import cores

PLAIN = AugmentConfig(crop="none", flip=False)


def quiet_make(source, out, **options):
    return make_shards(source, out, report=lambda line: None, progress=False, **options)


def numbered(batches, images: torch.Tensor) -> list[int]:
    """Which image of the split each image of a batch is; read with PLAIN."""
    index = batches.index
    known = {decode(read_bytes(index, i)).tobytes(): i for i in range(len(index)) if i not in batches.damaged}
    return [known[image.permute(1, 2, 0).contiguous().numpy().tobytes()] for image in images]


def read_bytes(index, i: int) -> bytes:
    data = (index.folder / index.shards[index.shard[i]]).read_bytes()
    return data[index.offset[i] : index.offset[i] + index.size[i]]


def damage(shards, key_numbers: list[int]) -> list[str]:
    """Overwrites images in their tars, which keep their size; gives the keys."""
    index = read_index(shards, "train")
    for i in key_numbers:
        path = shards / index.shards[index.shard[i]]
        data = bytearray(path.read_bytes())
        data[index.offset[i] : index.offset[i] + 64] = b"<html>" + bytes(58)
        path.write_bytes(data)
    return [index.key(i) for i in key_numbers]


@pytest.fixture
def own_shards(small_shards, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(small_shards, tmp_path / "shards")


@pytest.mark.parametrize("crop", ["inception", "shift", "none"])
@pytest.mark.parametrize("threads", [1, 3])
def test_resident_and_indexed_batches_are_bit_equal(small_shards, crop, threads):
    settings = {"augment": AugmentConfig(crop=crop), "seed": 5, "image": (12, 20)}
    resident = read_shards(small_shards, 16, reader="resident", threads=1, **settings)
    indexed = read_shards(small_shards, 16, reader="indexed", threads=threads, **settings)
    for step in [0, 3, 3, 7, 1000]:
        first, second = resident.at(step), indexed.at(step)
        assert torch.equal(first.images, second.images)
        assert torch.equal(first.labels, second.labels)
    assert first.images.shape == (16, 3, 12, 20)
    assert first.images.dtype == torch.uint8


def test_every_image_comes_once_an_epoch_across_the_borders_of_batches(small_shards):
    batches = read_shards(small_shards, 10, augment=PLAIN, seed=1)
    seen = numbered(batches, torch.cat([batches.at(step).images for step in range(16)]))
    for epoch in range(3):
        expected = permutation(53, 1, epoch).tolist()
        assert seen[53 * epoch : 53 * (epoch + 1)] == expected
    assert len(batches) == 6


def test_labels_belong_to_their_images(small_shards):
    batches = read_shards(small_shards, 53, augment=PLAIN)
    batch = batches.at(0)
    assert batch.labels.tolist() == [batches.index.label[i] for i in numbered(batches, batch.images)]
    assert set(batch.labels.tolist()) == {0, 1}


def test_iterating_gives_the_batches_of_each_step_from_any_start(small_shards):
    batches = read_shards(small_shards, 16, seed=2)
    for step, batch in zip(range(3, 9), batches.iterate(3), strict=False):
        assert torch.equal(batch.images, batches.at(step).images)


def test_evaluation_sees_each_image_once_in_order_and_ends_with_a_short_batch(small_shards):
    batches = read_shards(small_shards, 20, train=False)
    found = list(batches.iterate())
    assert [len(batch) for batch in found] == [20, 20, 13]
    assert numbered(batches, torch.cat([batch.images for batch in found])) == list(range(53))


@pytest.mark.parametrize("reader", ["resident", "indexed"])
def test_a_damaged_image_is_replaced_by_the_next_good_one_and_named_once(own_shards, reader, caplog):
    order = permutation(53, 0, 0)
    bad = sorted(order[[3, 4, 52]].tolist())  # two in a row, and the last of the epoch
    keys = damage(own_shards, bad)
    batches = read_shards(own_shards, 53, augment=PLAIN, reader=reader, threads=2)
    for _ in range(2):
        seen = numbered(batches, batches.at(0).images)
        assert seen[:3] + seen[5:52] == order[:3].tolist() + order[5:52].tolist()
        assert seen[3:5] == [order[5], order[5]]
        assert seen[52] == order[0], "after the epoch's last image comes its first"
    assert sorted(batches.damaged) == bad
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    for key in keys:
        assert sum(f"image {key} is damaged and passed over: not an image" in line for line in lines) == 1


def test_an_image_marked_damaged_is_replaced_as_one_found_damaged(own_shards):
    from dataclasses import replace

    from mpp.shards.index import write_index

    bad = permutation(53, 0, 0)[[3, 10]].tolist()
    damage(own_shards, bad)
    found = read_shards(own_shards, 20).at(0)
    index = read_index(own_shards, "train")
    marks = index.damaged.copy()
    marks[bad] = True
    write_index(replace(index, damaged=marks))
    batches = read_shards(own_shards, 20)
    assert torch.equal(batches.at(0).images, found.images)
    assert not batches.damaged


def test_an_image_that_another_took_the_place_of_is_damaged(own_shards):
    index = read_index(own_shards, "train")
    first, second = (own_shards / index.shards[0]).read_bytes(), (own_shards / index.shards[1]).read_bytes()
    if len(first) != len(second):
        pytest.skip("the shards differ in size, which is noticed when they are opened")
    (own_shards / index.shards[0]).write_bytes(second)
    batches = read_shards(own_shards, 53, reader="indexed")
    batches.at(0)
    assert {int(index.shard[i]) for i in batches.damaged} == {0}


def test_evaluation_leaves_damaged_images_out(own_shards):
    damage(own_shards, [0, 19, 20])
    batches = read_shards(own_shards, 20, train=False)
    assert [len(batch) for batch in batches.iterate()] == [18, 19, 13]
    assert len(batches.damaged) == 3


def test_shards_of_damaged_images_alone_stop_the_run_with_one_line(own_shards):
    damage(own_shards, list(range(53)))
    with pytest.raises(ValueError, match="and every image that could take its place is damaged"):
        read_shards(own_shards, 8).at(0)


def test_a_shard_that_goes_away_while_reading_stops_with_one_line(own_shards):
    batches = read_shards(own_shards, 53, reader="indexed")
    (own_shards / batches.index.shards[1]).unlink()
    with pytest.raises(ShardError, match=r"train-000001\.tar: gone, though the index names it"):
        batches.at(0)


@pytest.mark.parametrize("opened", [True, False])
def test_a_shard_that_is_cut_while_reading_stops_with_one_line(own_shards, opened):
    batches = read_shards(own_shards, 53, reader="indexed", threads=3)
    if opened:
        batches.at(0)
    with (own_shards / batches.index.shards[0]).open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ShardError, match=r"train-000000\.tar: 1000 bytes, the index says \d+"):
        batches.at(0)


def test_the_pictures_are_the_images_upright(tmp_path):
    upright = np.asarray(
        Image.fromarray(np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)).convert("RGB").resize((24, 16), 0)
    )
    (tmp_path / "source").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned: to be shown, turn clockwise
    turned = Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90)
    turned.save(tmp_path / "source/a.jpg", exif=exif, quality=100, subsampling=0)
    quiet_make(tmp_path / "source", tmp_path / "shards")
    batches = read_shards(tmp_path / "shards", 1, augment=PLAIN)
    assert batches.image == (16, 24)
    assert batches.at(0).labels is None
    picture = batches.at(0).images[0].permute(1, 2, 0).numpy()
    assert abs(picture.astype(int) - upright).max() <= 3


def test_images_of_several_sizes_need_a_size_to_be_asked_for(tmp_path):
    picture_folder(tmp_path / "source/a", 3, (16, 16), classes=1)
    picture_folder(tmp_path / "source/b", 3, (40, 20), classes=1)
    quiet_make(tmp_path / "source", tmp_path / "shards")
    with pytest.raises(ValueError, match="have 2 sizes; say which to make of them"):
        read_shards(tmp_path / "shards", 4)
    settings = {"image": (24, 24), "seed": 9}
    resident = read_shards(tmp_path / "shards", 4, reader="resident", **settings)
    indexed = read_shards(tmp_path / "shards", 4, reader="indexed", **settings)
    for step in range(5):
        assert torch.equal(resident.at(step).images, indexed.at(step).images)


def test_grey_shards_give_one_channel(tmp_path):
    picture_folder(tmp_path / "source", 4, (16, 16))
    quiet_make(tmp_path / "source", tmp_path / "shards", mode="L")
    assert read_shards(tmp_path / "shards", 4).at(0).images.shape == (4, 1, 16, 16)


def test_many_readers_of_one_split_agree(small_shards):
    batches = read_shards(small_shards, 16, reader="resident", threads=2)
    expected = [batches.at(step).images for step in range(8)]
    fresh = read_shards(small_shards, 16, reader="resident", threads=2)
    wrong = []

    def read() -> None:
        wrong.extend(step for step in range(8) if not torch.equal(fresh.at(step).images, expected[step]))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_auto_keeps_in_memory_what_fits(small_shards):
    from mpp.shards.pictures import Resident

    assert isinstance(read_shards(small_shards, 4)._images, Resident)
    assert not isinstance(read_shards(small_shards, 4, memory=1e-6)._images, Resident)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system gives no process cores of its own")
def test_one_thread_for_each_core_that_the_process_may_use():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert cores() == len(before)
