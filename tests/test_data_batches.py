"""Batches by themselves: what they say, where they end, and what they read."""

import shutil

import numpy as np
import pytest
import torch

import mpp
from mpp.shards import pictures
from mpp.shards.index import read_index


def test_batches_say_what_they_are_and_end_where_they_end(small_shards):
    train, test = mpp.read_shards(small_shards, 8), mpp.read_shards(small_shards, 8, train=False)
    assert "7 an epoch, each 8 images of 16x16; 53 images of split train of" in repr(train)
    assert [len(batch) for batch in test] == [8] * 6 + [5]
    assert len(list(train)) == 7
    assert torch.equal(next(iter(train)).images, train.at(0).images)
    assert len(train.at(9999)) == 8, "training goes on without end"
    for step in (7, 9999, -1):
        with pytest.raises(IndexError, match=f"no batch {step}: steps go from 0 to 6"):
            test.at(step)


def test_in_evaluation_a_damaged_image_is_left_out_and_no_other_one_is_decoded_again(
    small_shards, tmp_path, monkeypatch
):
    shards = shutil.copytree(small_shards, tmp_path / "shards")
    whole = mpp.read_shards(shards, 8, train=False, reader="indexed").at(1)
    index = read_index(shards, "train")
    with (shards / index.shards[0]).open("r+b") as tar:
        tar.seek(int(index.offset[10]))
        tar.write(b"no picture")
    decoded, decode = [], pictures.decode_first
    monkeypatch.setattr(pictures, "decode_first", lambda data, mode: decoded.append(1) or decode(data, mode))
    batches = mpp.read_shards(shards, 8, train=False, reader="indexed")
    found = batches.at(1)  # images 8 to 15
    assert list(batches.damaged) == [10]
    assert torch.equal(found.images, whole.images[np.array([0, 1, 3, 4, 5, 6, 7])])
    assert len(decoded) == 8
