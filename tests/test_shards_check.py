"""mpp/shards/check.py: each bad image is named with its shard and its cause."""

import os

import pytest
from shard_files import labelled, png, quiet, write_tar

from mpp.shards import check
from mpp.shards.build import index_folder
from mpp.shards.check import check_folder
from mpp.shards.index import read_index
from mpp.shards.tar import ShardError


def test_check_lists_each_bad_image_with_shard_key_and_cause_and_marks_it(tmp_path):
    cut = png(1)[:-60]
    write_tar(tmp_path / "t-0.tar", [("good.png", png(0)), ("cut.png", cut), ("page.jpg", b"<html>")])
    lines: list[str] = []
    (index,) = index_folder(tmp_path, report=lines.append)
    assert index.damaged.tolist() == [False, False, True]  # only the header was looked at
    assert "t-0.tar page: not an image (starts with b'<html>')" in lines
    lines.clear()
    assert check_folder(tmp_path, report=lines.append) == 2
    assert any(line.startswith("t-0.tar cut: truncated PNG") for line in lines)
    assert read_index(tmp_path, "t").damaged.tolist() == [False, False, True]
    check_folder(tmp_path, mark=True, report=quiet)
    assert read_index(tmp_path, "t").damaged.tolist() == [False, True, True]


def test_check_finds_bytes_that_changed_behind_the_index(tmp_path):
    path = write_tar(tmp_path / "test-000000.tar", labelled(3, ["2"]))
    index_folder(tmp_path, report=quiet)
    write_tar(path, [(f"{i:04d}.{e}", d) for i in range(3) for e, d in (("png", png(i + 50)), ("cls", b"2"))])
    lines: list[str] = []
    assert check_folder(tmp_path, report=lines.append) == 3
    assert "checksum" in lines[0]


@pytest.mark.parametrize("vanish", [True, False])
def test_a_shard_that_vanishes_or_shrinks_meanwhile_is_one_line(tmp_path, monkeypatch, vanish):
    for shard in range(2):
        write_tar(tmp_path / f"t-{shard}.tar", labelled(4, ["2"], start=4 * shard))
    index_folder(tmp_path, report=quiet)

    def read_and_lose(*arguments):
        index = read_index(*arguments)
        (tmp_path / "t-1.tar").unlink() if vanish else os.truncate(tmp_path / "t-1.tar", 700)
        return index

    monkeypatch.setattr(check, "read_index", read_and_lose)
    with pytest.raises(ShardError, match=r"t-1\.tar: (gone|700 bytes)") as caught:
        check_folder(tmp_path, report=quiet)
    assert "\n" not in str(caught.value)
