"""mpp/shards/tar.py against Python's tarfile and webdataset's own reader."""

import io
import os
import tarfile
from pathlib import Path

import pytest
import webdataset
from shard_files import (
    labelled,
    png,
    write_tar,
)

from mpp.shards import tar as tars
from mpp.shards.build import index_folder
from mpp.shards.labels import labeller
from mpp.shards.tar import Scan, ShardError, scan_shard


def scan(path: Path) -> Scan:
    return scan_shard(path, labeller("cls"))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_are_read_as_tarfile_reads_them(tmp_path, form):
    names = ["d" * 90 + "/" + "k" * 60 + ".png", "short.png"]
    if form != tarfile.USTAR_FORMAT:
        names += ["x" * 300 + "/" + "y" * 200 + ".png", "grüße/日本.png"]
    path = write_tar(tmp_path / "t-0.tar", [(name, png(i)) for i, name in enumerate(names)], form)
    assert [sample.key for sample in scan(path).samples] == [name.removesuffix(".png") for name in names]
    with tarfile.open(path) as tar:
        assert [m.offset_data for m in tar] == [sample.offset for sample in scan(path).samples]


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"
)  # webdataset's
def test_samples_are_grouped_as_webdataset_groups_them(tmp_path):
    members = [
        ("a.b/one.JPG", png(1, kind="JPEG")), ("a.b/one.cls", b"3\n"), ("a.b/one.seg.png", png(2)),
        ("two.txt", b"no image"), ("three.webp", png(3, kind="WEBP")), ("__meta__", b"?"), ("noending", b"?"),
    ]  # fmt: skip
    path = write_tar(tmp_path / "t-0.tar", members)
    found = scan(path)
    assert [(s.key, s.label, s.size) for s in found.samples] == [
        ("a.b/one", "3", len(members[0][1])),
        ("three", "", len(members[4][1])),
    ]
    assert found.without_image == 1
    keys = [s["__key__"] for s in webdataset.WebDataset(str(path), shardshuffle=False)]
    assert keys == ["a.b/one", "two", "three"]


def test_folders_and_links_in_a_tar_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "t-0.tar", "w") as tar:
        for name, kind in (("dir", tarfile.DIRTYPE), ("link.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.png"
            tar.addfile(info)
        info = tarfile.TarInfo("a.png")
        info.size = len(png())
        tar.addfile(info, io.BytesIO(png()))
    found = scan(tmp_path / "t-0.tar")
    assert [sample.key for sample in found.samples] == ["a"]
    assert found.links == 2
    lines: list[str] = []
    index_folder(tmp_path, report=lines.append)
    assert "t: left out 2 links" in lines


def test_a_tar_with_a_changed_header_or_a_foreign_file_is_refused(tmp_path):
    path = write_tar(tmp_path / "t-0.tar", labelled(3, ["0"]))
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match="no tar header at byte 0"):
        scan(path)
    path.write_bytes(b"\x1f\x8b" + bytes(range(256)) * 8)
    with pytest.raises(ShardError, match="no tar header at byte 0"):
        scan(path)


@pytest.mark.parametrize(
    "record", [b"9" * 5000 + b" size=1\n", b"30 size=" + b"9" * 5000 + b"\n", b"3 a\n", b"no record"]
)
def test_a_pax_header_that_makes_no_sense_is_refused(tmp_path, record):
    info = tarfile.TarInfo("pax")
    info.type, info.size = b"x", len(record)
    data = info.tobuf(tarfile.USTAR_FORMAT) + record
    (tmp_path / "t-0.tar").write_bytes(data + bytes(-len(data) % 512 + 1024))
    with pytest.raises(ShardError, match="damaged pax header"):
        scan(tmp_path / "t-0.tar")


def test_json_and_cls_that_hold_anything_do_no_harm(tmp_path):
    members = [("1.png", png()), ("1.json", b"[" * 100_000), ("1.cls", b"\xff\0cat")]
    (sample,) = scan(write_tar(tmp_path / "t-0.tar", members)).samples
    assert (sample.name, sample.label) == ("", "\\xff\0cat")


def test_headers_and_names_without_bounds_are_refused_at_once(tmp_path):
    path = write_tar(tmp_path / "t-0.tar", [("a/" * 3000 + "x.png", png())], tarfile.PAX_FORMAT)
    with pytest.raises(ShardError, match="a name of 6005 bytes; expected at most 4096"):
        scan(path)
    info = tarfile.TarInfo("pax")
    info.type, info.size = b"x", 2**40
    with open(path, "wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(2**40 + 10_000)  # a sparse file: takes no space on the disk
    with pytest.raises(ShardError, match="a name or pax header of 1099511627776 bytes at byte 0"):
        scan(path)


def test_an_image_that_would_fill_the_memory_is_damaged(tmp_path):
    info = tarfile.TarInfo("a.png")
    info.size = 2**40
    with open(tmp_path / "t-0.tar", "wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(2**40 + 10_000)
    (sample,) = scan(tmp_path / "t-0.tar").samples
    assert sample.damage == "1099511627776 bytes, more than the limit of 1073741824"


def test_a_shard_that_is_cut_while_it_is_read_is_one_line(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "t-0.tar", [(f"{i}.png", png(i, 200, 200)) for i in range(3)])
    walk = tars.walk_tar

    def walk_and_cut(tar: tars.Bytes) -> list[tars.Member]:
        members = list(walk(tar))
        os.truncate(path, 5000)
        return members

    monkeypatch.setattr(tars, "walk_tar", walk_and_cut)
    with pytest.raises(ShardError, match="became shorter while it was read"):
        scan(path)
