"""Images that are met again are decoded in less time, to the same pixels and with the same damage."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from shard_files import write_tar

from mpp.augment.config import AugmentConfig
from mpp.data.read import read_shards
from mpp.decode import DamagedImage, decode
from mpp.shards.build import index_folder
from mpp.shards.index import read_index
from mpp.shards.pictures import Indexed, Shards

TALL = 120, 50  # pixels


def photograph(seed: int, **options) -> bytes:
    rough = np.random.default_rng(seed).integers(0, 256, (9, 5, 3), np.uint8)
    Image.fromarray(rough).resize(TALL[::-1]).save(data := io.BytesIO(), "JPEG", **options)
    return data.getvalue()


def broken_below(data: bytes) -> bytes:
    """The same length, but its codes end at about two thirds of the picture."""
    cut = len(data) * 3 // 4
    return data[:cut] + b"\xff\xd9" + bytes(len(data) - cut - 2)


@pytest.fixture
def shards(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    members = [photograph(0), photograph(1, subsampling=0), photograph(2, progressive=True), photograph(3, exif=exif)]
    members += [broken_below(photograph(4)), photograph(5, restart_marker_rows=1)]
    write_tar(tmp_path / "train-0.tar", [(f"{i}.jpg", data) for i, data in enumerate(members)])
    index_folder(tmp_path, report=lambda line: None)
    return tmp_path


def images_of(shards) -> tuple[Indexed, list[bytes]]:
    index = read_index(shards, "train")
    tar = (shards / "train-0.tar").read_bytes()
    encoded = [tar[start : start + size] for start, size in zip(index.offset, index.size, strict=True)]
    return Indexed(Shards(index)), encoded


@pytest.mark.parametrize("end", [1, 37, 120])
def test_images_met_again_have_the_pixels_of_the_first_time(shards, end):
    images, encoded = images_of(shards)
    numbers = np.array([0, 1, 2, 3, 5, 0])
    for _ in range(3):
        found = images.each(numbers, np.full(len(numbers), end))
        for number, pixels in zip(numbers, found, strict=True):
            assert np.array_equal(pixels[:end], decode(encoded[number])[:end])


def test_damage_below_a_crop_is_found_whatever_the_crop_is(shards):
    images, _ = images_of(shards)
    for end in (1, 120, 1):
        (found,) = images.each(np.array([4]), np.array([end]))
        assert isinstance(found, DamagedImage)


def test_an_image_that_changes_after_it_was_met_is_damaged(shards):
    images, encoded = images_of(shards)
    place = int(images.index.offset[0]) + len(encoded[0]) - 30
    list(images.each(np.array([0]), np.array([120])))
    with (shards / "train-0.tar").open("r+b") as tar:
        tar.seek(place)
        tar.write(b"\x55\x55\x55")
    for end in (1, 120):
        (found,) = images.each(np.array([0]), np.array([end]))
        assert isinstance(found, DamagedImage)


@pytest.mark.parametrize("threads", [1, 3])
def test_both_readers_agree_in_every_epoch(shards, threads):
    settings = {"image": (24, 24), "augment": AugmentConfig(area=(0.05, 0.3)), "seed": 2}
    resident = read_shards(shards, 5, reader="resident", **settings)
    indexed = read_shards(shards, 5, reader="indexed", threads=threads, **settings)
    fresh = read_shards(shards, 5, reader="indexed", **settings)
    for step in [*range(9), 0, 7]:
        assert torch.equal(resident.at(step).images, indexed.at(step).images)
    assert torch.equal(fresh.at(8).images, indexed.at(8).images)
    assert set(indexed.damaged) == {4}
