"""mpp/shards/build.py against Python's tarfile and against tars written by webdataset's own writer."""

import io
import os
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import webdataset
from shard_files import png, quiet, three_shards, write_tar

from mpp.shards.build import index_folder
from mpp.shards.check import check_folder
from mpp.shards.index import read_index, splits, write_index
from mpp.shards.tar import ShardError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return three_shards(tmp_path)


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
    names = ["../../evil", "/etc/passwd", "a\nb", "\udcff\u202e"]
    write_tar(inside / "t-0.tar", [(f"{name}.png", png()) for name in names] + [("c\n.png", b"?")], tarfile.GNU_FORMAT)
    lines: list[str] = []
    (index,) = index_folder(inside, report=lines.append)
    assert [index.key(i) for i in range(5)] == [*names, "c\n"]
    assert lines[0].startswith(r"t-0.tar 'c\n': not an image")
    assert not [line for line in lines if "\n" in line]
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
        index_folder(tmp_path, report=quiet)
    write_tar(tmp_path / "t-0.tar", [("a.png", png()), ("b.png", png()), ("a.png", png())])
    with pytest.raises(ShardError, match=r"key a occurs 2 times in t: in t-0\.tar, t-0\.tar"):
        index_folder(tmp_path, report=quiet)


def test_a_split_is_a_part_of_a_file_name(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.png", png())])
    for split in ("../x", ""):
        with pytest.raises(ShardError, match="a split is part of a file name"):
            index_folder(tmp_path, split, report=quiet)


def test_names_with_nul_bytes_are_only_names(tmp_path):
    info = tarfile.TarInfo("x.png")
    info.pax_headers, info.size = {"path": "a\0b.png"}, len(png())
    with tarfile.open(tmp_path / "t-0.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(png()))
    (index,) = index_folder(tmp_path, report=quiet)
    assert index.key(0) == "a\0b"
    assert check_folder(tmp_path, report=quiet) == 0


def test_a_pipe_among_the_shards_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "t-0.tar")
    with pytest.raises(ShardError, match=r"t-0\.tar: cannot be read: no regular file"):
        index_folder(tmp_path, report=quiet)


def test_the_mode_of_the_index_that_is_there_is_kept(folder):
    for split in ("train", "test"):
        write_index(replace(read_index(folder, split), mode="L"))
    (folder / "test-index.safetensors").write_bytes(b"cut")
    modes = {index.split: index.mode for index in index_folder(folder, report=quiet)}
    assert modes == {"test": "RGB", "train": "L"}
