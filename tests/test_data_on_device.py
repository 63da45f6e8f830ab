"""Batches made on a device: the same images and draws as on the CPU. A CPU stands for the device here."""

import functools
import shutil

import numpy as np
import pytest
import simplejpeg
import torch
from conftest import picture_folder

from mpp.augment.config import AugmentConfig
from mpp.data.batches import Batches, faster
from mpp.data.config import DataConfig
from mpp.data.on_device import Decoded, DeviceBatches, Kept
from mpp.data.read import open_batches
from mpp.seeds import permutation
from mpp.shards.index import read_index
from mpp.shards.write import make_shards

CPU = torch.device("cpu")
CROPS = AugmentConfig(area=(0.3, 1.0))
STRONG = AugmentConfig(area=(0.3, 1.0), jitter=(0.4, 0.4, 0.2, 0.1), grey=0.2, blur=0.5, solarize=0.2, erase=0.5)


def both(shards, batch: int = 10, augment: AugmentConfig = CROPS, **settings) -> tuple[Batches, DeviceBatches]:
    image = settings.pop("image", (16, 16))
    train, threads = settings.pop("train", True), settings.pop("threads", 2)
    config = DataConfig(str(shards), augment=augment, threads=threads, **settings)
    index = read_index(shards, "train")
    first, second = (
        open_batches([index], batch, config, image=image, seed=3, train=train, device=d) for d in (None, CPU)
    )
    assert isinstance(second, DeviceBatches)
    return first, second


def apart(first: Batches, second: Batches, steps: range) -> int:
    """The largest difference of any pixel."""
    pairs = [(first.at(step), second.at(step)) for step in steps]
    for ours, theirs in pairs:
        assert ours.images.shape == theirs.images.shape
        assert theirs.images.dtype == torch.uint8
        assert torch.equal(ours.labels, theirs.labels)
    return max((a.images.int() - b.images.int()).abs().max().item() for a, b in pairs if len(a))


@pytest.mark.parametrize("reader", ["resident", "indexed"])
@pytest.mark.parametrize("train", [True, False])
def test_pictures_differ_by_rounding_alone(small_shards, reader, train):
    on_cpu, on_device = both(small_shards, reader=reader, train=train)
    assert isinstance(on_device._source, Kept if reader == "resident" else Decoded)
    assert apart(on_cpu, on_device, range(6)) <= 1
    assert all(image is None for image in getattr(on_device._images, "_kept", [])), "none lies in the host's memory too"


@pytest.mark.parametrize("reader", ["resident", "indexed"])
def test_without_resizing_they_are_equal(small_shards, reader):
    on_cpu, on_device = both(small_shards, augment=AugmentConfig(crop="shift"), reader=reader)
    assert apart(on_cpu, on_device, range(12)) == 0


def test_strong_augmentation_is_drawn_alike(small_shards):
    on_cpu, on_device = both(small_shards, augment=STRONG, reader="resident")
    different = []
    for step in range(6):
        ours, theirs = on_cpu.at(step).images.int(), on_device.at(step).images.int()
        different.append(((ours - theirs).abs() > 8).float().mean().item())
    assert np.mean(different) < 0.01, "roundings add up, and solarising turns values about its threshold"


def test_images_of_different_sizes_are_decoded_each_time(tmp_path):
    picture_folder(tmp_path / "source/a", 5, (16, 16), classes=1)
    picture_folder(tmp_path / "source/b", 5, (40, 20), classes=1)
    make_shards(tmp_path / "source", tmp_path / "shards", report=lambda line: None, progress=False)
    on_cpu, on_device = both(tmp_path / "shards", image=(24, 24), reader="resident")
    assert isinstance(on_device._source, Decoded)
    assert apart(on_cpu, on_device, range(3)) <= 1


@pytest.mark.parametrize("reader", ["resident", "indexed"])
@pytest.mark.parametrize("train", [True, False])
def test_damaged_images_are_replaced_by_the_same_ones_as_on_the_cpu(small_shards, tmp_path, reader, train):
    shards = shutil.copytree(small_shards, tmp_path / "shards")
    index, bad = read_index(shards, "train"), permutation(53, 3, 0)[[3, 4, 20]].tolist()
    for number in bad:
        path = shards / index.shards[index.shard[number]]
        data = bytearray(path.read_bytes())
        data[index.offset[number] : index.offset[number] + 64] = bytes(64)
        path.write_bytes(data)
    on_cpu, on_device = both(shards, reader=reader, train=train)
    assert apart(on_cpu, on_device, range(6)) <= 1
    assert on_cpu.damaged.keys() == on_device.damaged.keys() == set(bad)
    assert list(on_cpu.damaged.values()) == list(on_device.damaged.values())


def test_the_faster_of_two_is_kept(small_shards, monkeypatch):
    on_cpu, on_device = both(small_shards)
    monkeypatch.setattr("mpp.data.batches._seconds", lambda batches: {on_cpu: 2.0, on_device: 1.0}[batches])
    assert faster(on_cpu, on_device) is on_device
    monkeypatch.setattr("mpp.data.batches._seconds", lambda batches: {on_cpu: 1.0, on_device: 2.0}[batches])
    assert faster(on_cpu, on_device) is on_cpu


def test_a_device_that_fails_leaves_pictures_to_the_cpu(small_shards, monkeypatch, caplog):
    on_cpu, on_device = both(small_shards)

    def fail(*_: object, compiled: bool) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("mpp.data.on_device.augment", fail)
    assert faster(on_cpu, on_device) is on_cpu
    assert "the device fails: CUDA out of memory" in caplog.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU")
@pytest.mark.parametrize("reader", ["resident", "indexed"])
def test_on_cuda_pictures_are_those_of_the_cpu(small_shards, reader, monkeypatch):
    if reader == "indexed":  # nvJPEG decodes, and enlarges half-size colours plainly
        monkeypatch.setattr(simplejpeg, "decode_jpeg", functools.partial(simplejpeg.decode_jpeg, fastupsample=True))
    config = DataConfig(str(small_shards), augment=CROPS, reader=reader)
    index = read_index(small_shards, "train")
    on_cpu, on_cuda = (
        open_batches([index], 10, config, image=(16, 16), seed=3, device=device)
        for device in (None, torch.device("cuda"))
    )
    for step in range(6):
        ours, theirs = on_cpu.at(step).images.int(), on_cuda.at(step).images.cpu().int()
        assert (ours - theirs).abs().float().mean().item() < 0.5, "nvJPEG's inverse DCT rounds as it likes"
