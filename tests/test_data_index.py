"""mpp/data/index.py against Python's tarfile and against tars written by webdataset's own writer."""

import json
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from safetensors.numpy import save
from shard_files import labelled, png, quiet, write_tar

from mpp.data.check import check_folder
from mpp.data.index import ARRAYS, index_folder, read_index, splits, write_index
from mpp.data.tar import ShardError, scan_shard


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards of two splits, indexed."""
    write_tar(tmp_path / "train-000000.tar", labelled(5, ["0", "2"]))
    write_tar(tmp_path / "train-000001.tar", labelled(4, ["0", "2"], start=5))
    write_tar(tmp_path / "test-000000.tar", labelled(3, ["2"]))
    index_folder(tmp_path, report=quiet)
    return tmp_path


def in_tarfile(folder: Path, index, i: int) -> bytes:
    """The i-th image by Python's own reader."""
    with tarfile.open(folder / index.shards[index.shard[i]]) as tar:
        member = next(m for m in tar if m.name.startswith(index.key(i) + ".") and not m.name.endswith(("cls", "json")))
        assert (member.offset_data, member.size) == (index.offset[i], index.size[i])
        return tar.extractfile(member).read()


def test_offsets_sizes_and_checksums_agree_with_tarfile(folder):
    index = read_index(folder, "train")
    assert len(index) == 9
    for i in range(9):
        assert in_tarfile(folder, index, i) == png(i)
        assert index.crc32[i] == zlib.crc32(png(i))
        assert index.key(i) == f"{i:04d}"
    assert (index.height == 6).all()
    assert (index.width == 9).all()


def test_an_index_is_read_as_it_was_written(folder):
    index = read_index(folder, "train")
    write_index(replace(index, mode="L"))
    again = read_index(folder, "train")
    assert again.mode == "L"
    assert all(np.array_equal(getattr(index, name), getattr(again, name)) for name in ARRAYS)
    assert [getattr(again, name).dtype for name in ARRAYS] == [getattr(index, name).dtype for name in ARRAYS]
    assert splits(folder) == ["test", "train"]
    assert not list(folder.glob("*.part"))


def test_integer_labels_stay_and_names_are_numbered_alike_in_every_split(tmp_path, folder):
    assert read_index(folder, "train").classes == read_index(folder, "test").classes == ("0", "1", "2")
    assert set(read_index(folder, "test").label) == {2}
    names = tmp_path / "names"
    names.mkdir()
    write_tar(names / "a-0.tar", labelled(3, ["cat", "dog", "ant"]))
    write_tar(names / "b-0.tar", labelled(2, ["dog"]))
    first, second = index_folder(names, report=quiet)
    assert first.classes == second.classes == ("ant", "cat", "dog")
    assert first.label.tolist() == [1, 2, 0]
    assert second.label.tolist() == [2, 2]


def test_tars_of_webdatasets_writer_are_indexed(tmp_path):
    with webdataset.ShardWriter(str(tmp_path / "photos-%06d.tar"), maxcount=4, verbose=0) as writer:
        for i in range(10):
            writer.write({"__key__": f"deep/er.dir/{i}", "jpg": png(i, kind="JPEG"), "cls": i % 3, "json": {"a": [i]}})
    (index,) = index_folder(tmp_path, report=quiet)
    assert (index.split, len(index), len(index.shards)) == ("photos", 10, 3)
    assert index.label.tolist() == [i % 3 for i in range(10)]
    assert index.key(7) == "deep/er.dir/7"
    assert all(in_tarfile(tmp_path, index, i) == png(i, kind="JPEG") for i in range(10))


def test_tars_of_img2dataset_get_the_split_that_is_asked_for(tmp_path):
    for shard in range(2):
        members = []
        for i in range(3):
            key = f"{shard:05d}{i:04d}"
            members += [
                (f"{key}.jpg", png(i, kind="JPEG")),
                (f"{key}.txt", b"a cat"),
                (f"{key}.json", b'{"caption": 1}'),
            ]
        write_tar(tmp_path / f"{shard:05d}.tar", members)
    assert [index.split for index in index_folder(tmp_path, report=quiet)] == ["train"]
    (index,) = index_folder(tmp_path, split="web", report=quiet)
    assert (index.split, len(index), index.classes, set(index.label)) == ("web", 6, (), {-1})


def test_hostile_keys_are_only_names(tmp_path):
    inside = tmp_path / "in"
    inside.mkdir()
    write_tar(inside / "t-0.tar", [("../../evil.png", png()), ("/etc/passwd.png", png()), ("a\nb.png", png())])
    (index,) = index_folder(inside, report=quiet)
    assert [index.key(i) for i in range(3)] == ["../../evil", "/etc/passwd", "a\nb"]
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["in", "t-0.tar", "t-index.safetensors"]


@pytest.mark.parametrize("cut", [100, 700, 5000, -1024, -10_000])
def test_a_cut_tar_is_refused_with_the_byte_where_it_ends(tmp_path, cut):
    path = write_tar(tmp_path / "t-000007.tar", [(f"{i}.png", png(i, 40, 40)) for i in range(4)])
    with tarfile.open(path) as tar:
        end = max(m.offset_data + -(-m.size // 512) * 512 for m in tar)
    data = path.read_bytes()[: end if cut == -1024 else cut]  # -1024: only the end mark is gone
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"t-000007\.tar") as caught:
        index_folder(tmp_path, report=quiet)
    assert str(len(data)) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not splits(tmp_path)


def test_a_key_that_occurs_twice_is_refused_with_its_shards(tmp_path):
    for shard in range(2):
        write_tar(tmp_path / f"t-{shard}.tar", [("same.png", png(shard))])
    with pytest.raises(ShardError, match=r"key same occurs 2 times in t: in t-0\.tar, t-1\.tar"):
        index_folder(tmp_path, report=quiet)
    write_tar(tmp_path / "t-0.tar", [("a.png", png()), ("a.png", png())])
    with pytest.raises(ShardError, match=r"a\.png occurs twice"):
        scan_shard(tmp_path / "t-0.tar")


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


def test_class_names_in_json_are_kept_and_other_json_does_no_harm(tmp_path):
    facts = [json.dumps({"class": "cat"}).encode(), b"[1]", b"not json", b'{"class": 5}']
    members = [
        m for i, f in enumerate(facts) for m in ((f"{i}.png", png(i)), (f"{i}.cls", b"%d" % i), (f"{i}.json", f))
    ]
    write_tar(tmp_path / "t-0.tar", members)
    (index,) = index_folder(tmp_path, report=quiet)
    assert index.classes == ("cat", "1", "2", "3")


@pytest.mark.parametrize("digits", ["1234567", "9" * 6000])
def test_integers_too_large_for_classes_are_refused(tmp_path, digits):
    write_tar(tmp_path / "t-0.tar", labelled(2, [digits]))
    with pytest.raises(ShardError, match="no classes"):
        index_folder(tmp_path, report=quiet)


def test_a_split_is_a_part_of_a_file_name(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.png", png())])
    for split in ("../x", ""):
        with pytest.raises(ShardError, match="a split is part of a file name"):
            index_folder(tmp_path, split, report=quiet)


def test_an_index_whose_parts_do_not_fit_is_refused(folder):
    index = read_index(folder, "train")
    for change in ({"mode": "CMYK"}, {"shard_bytes": ()}, {"label": index.label[1:]}, {"shard": index.shard + 7}):
        write_index(replace(index, **change))
        assert "train-index.safetensors: cut, or no index of mpp" in message(folder)


def test_a_file_is_no_folder_of_shards(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    assert "a file, not a folder of shards" in message(tmp_path / "file")
