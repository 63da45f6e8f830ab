"""mpp/shards/index.py: an index is read as it was written, or refused in one line."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save
from shard_files import three_shards

from mpp.shards.build import index_folder
from mpp.shards.check import check_folder
from mpp.shards.index import ARRAYS, read_index, splits, write_index
from mpp.shards.tar import ShardError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return three_shards(tmp_path)


def test_an_index_is_read_as_it_was_written(folder):
    index = read_index(folder, "train")
    write_index(replace(index, mode="L"))
    again = read_index(folder, "train")
    assert again.mode == "L"
    assert all(np.array_equal(getattr(index, name), getattr(again, name)) for name in ARRAYS)
    assert [getattr(again, name).dtype for name in ARRAYS] == [getattr(index, name).dtype for name in ARRAYS]
    assert splits(folder) == ["test", "train"]
    assert not list(folder.glob("*.part"))


def message(folder: Path, split: str = "train") -> str:
    with pytest.raises(ShardError) as caught:
        read_index(folder, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_folder_split_or_index_is_said_in_one_line(folder, tmp_path):
    assert "no such folder" in message(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "no shards" in message(tmp_path / "empty")
    assert "it holds test, train" in message(folder, "val")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert f"run `mpp shards index {folder}`" in message(folder)
    for function in (index_folder, check_folder):
        with pytest.raises(ShardError, match="no shards"):
            function(tmp_path / "empty")


def test_a_missing_or_cut_shard_is_named_with_both_sizes(folder):
    path = folder / "train-000001.tar"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:1234])
    assert f"train-000001.tar: 1234 bytes, the index says {size}" in message(folder)
    path.unlink()
    assert "train-000001.tar: missing" in message(folder)


@pytest.mark.parametrize("content", [b"", b"hello", save({"a": np.zeros(3)}), save({"a": np.zeros(3)}, {"mpp": "{}"})])
def test_a_foreign_or_cut_index_is_refused(folder, content):
    path = folder / "train-index.safetensors"
    whole = path.read_bytes()
    path.write_bytes(content)
    assert "train-index.safetensors: cut, or no index of mpp" in message(folder)
    path.write_bytes(whole[: len(whole) // 2])
    assert "train-index.safetensors: cut, or no index of mpp" in message(folder)


def test_an_index_that_points_outside_its_shards_is_refused(folder):
    index = read_index(folder, "train")
    write_index(replace(index, offset=index.offset + 10**6))
    assert "outside its shards" in message(folder)


def test_an_index_whose_parts_do_not_fit_is_refused(folder):
    index = read_index(folder, "train")
    for change in ({"mode": "CMYK"}, {"shard_bytes": ()}, {"label": index.label[1:]}, {"shard": index.shard + 7}):
        write_index(replace(index, **change))
        assert "train-index.safetensors: cut, or no index of mpp" in message(folder)


def test_a_file_is_no_folder_of_shards(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    assert "a file, not a folder of shards" in message(tmp_path / "file")


def test_a_flipped_bit_in_an_index_is_noticed_or_changes_nothing(small_shards, tmp_path):
    shutil.copytree(small_shards, tmp_path / "shards")
    path, index = tmp_path / "shards/train-index.safetensors", read_index(small_shards, "train")
    data, noticed = path.read_bytes(), 0
    places = range(0, len(data), 5)
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            found = read_index(tmp_path / "shards", "train")
        except ShardError as error:
            noticed += "train-index.safetensors: cut, or no index of mpp" in str(error)
            continue
        assert (found.shards, found.classes, found.labels) == (index.shards, index.classes, index.labels)
        assert all((getattr(found, name) == getattr(index, name)).all() for name in ARRAYS)
    assert noticed > 0.97 * len(places)
