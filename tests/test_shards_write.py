"""mpp/shards/write.py: what comes out of `mpp shards make` is read back by tarfile, webdataset and Pillow."""

import errno
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from shard_files import (
    CLASSES,
    contents,
    image,
    make,
    refused,
    stored,
    write_files,
)

from mpp.decode import decode
from mpp.errors import UserError
from mpp.remote.fetch import Retry
from mpp.shards import write
from mpp.shards.build import index_folder
from mpp.shards.build_urls import index_urls
from mpp.shards.check import check_folder
from mpp.shards.index import read_index
from mpp.shards.tar import ShardError

MAKE = (
    "import sys, json; from mpp.shards.write import make_shards; make_shards(*sys.argv[1:3], **json.loads(sys.argv[3]))"
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_files(tmp_path / "source", CLASSES)


def test_folders_become_splits_and_classes_and_bytes_are_kept(source, tmp_path):
    indexes, lines = make(source, tmp_path / "out")
    assert [(index.split, len(index), index.classes) for index in indexes] == [
        ("test", 12, ("cat", "dog")),
        ("train", 12, ("cat", "dog")),
    ]
    assert stored(tmp_path / "out") == {name: ("jpg", data, name.split("/")[1]) for name, data in CLASSES.items()}
    assert "24 images; test 12, train 12" in lines[0]
    assert "2 classes, named by folders: cat, dog" in lines[1]
    assert check_folder(tmp_path / "out", report=lines.append) == 0


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"
)  # webdataset's
def test_webdataset_reads_the_shards(source, tmp_path):
    make(source, tmp_path / "out", per_shard=5)
    urls = [str(path) for path in sorted((tmp_path / "out").glob("train-*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("jpg", "cls", "json"))
    index = read_index(tmp_path / "out", "train")
    assert len(urls) == 3
    assert [label for _, label, _ in samples] == index.label.tolist()
    for pixels, label, facts in samples:
        assert np.array_equal(pixels, decode(CLASSES[facts["source"]]))
        assert facts["class"] == ("cat", "dog")[label]
        assert (facts["width"], facts["height"]) == (16, 12)


def test_indexing_the_shards_again_gives_the_same_index(source, tmp_path):
    make(source, tmp_path / "out", per_shard=5, mode="L")
    before = contents(tmp_path / "out")
    index_folder(tmp_path / "out", report=lambda _: None)
    assert contents(tmp_path / "out") == before


def test_single_shards_are_mixed_in_an_order_that_never_changes(source, tmp_path):
    (_, index), _ = make(source, tmp_path / "a", per_shard=6)
    assert len(set(index.label[:6])) == 2
    make(source, tmp_path / "b", per_shard=6, workers=1)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    names = [name for name in CLASSES if name.startswith("train/")]
    keys = sorted(hashlib.blake2b(name.encode()).hexdigest()[:16] for name in names)
    assert [index.key(i) for i in range(12)] == keys
    with tarfile.open(tmp_path / "a" / "train-000000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in tar} == {(0, 0, 0, "", 0o644)}


def test_damaged_images_are_left_out_and_named_with_their_cause(source, tmp_path):
    bad = {"train/cat/page.jpg": b"<html>", "test/dog/cut.jpg": image()[:-60], "test/dog/none.png": b""}
    indexes, lines = make(write_files(source, bad), tmp_path / "out", per_shard=4)
    assert [len(index) for index in indexes] == [12, 12]
    assert "left out: train/cat/page.jpg: not an image (starts with b'<html>')" in lines
    assert "left out: test/dog/none.png: empty file" in lines
    assert "left out: 3 images that cannot be decoded" in lines
    shutil.rmtree(source)
    assert "none of the 1 images of train can be decoded" in refused(
        write_files(source, {"a.jpg": b"x"}), tmp_path / "b"
    )


def odd_files() -> dict[str, bytes]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 14, 3), np.uint8))
    sixteen = Image.fromarray(np.arange(9 * 14, dtype=np.uint16).reshape(9, 14) * 500)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {}
    for name, picture, kind, options in [
        ("grey.png", noise.convert("L"), "PNG", {}), ("palette.gif", noise.convert("P"), "GIF", {}),
        ("cmyk.jpg", noise.convert("CMYK"), "JPEG", {}), ("alpha.png", noise.convert("RGBA"), "PNG", {}),
        ("deep.png", sixteen, "PNG", {}), ("deep.tif", sixteen, "TIFF", {}),
        ("turned.jpg", noise, "JPEG", {"exif": exif}), ("turned.png", noise, "PNG", {"exif": exif}),
        ("plain.bmp", noise, "BMP", {}), ("plain.ppm", noise, "PPM", {}), ("plain.webp", noise, "WEBP", {}),
    ]:  # fmt: skip
        picture.save(data := io.BytesIO(), kind, **options)
        files[name] = data.getvalue()
    return files


def test_odd_files_come_out_as_upright_rgb(tmp_path):
    files = odd_files()
    (index,), _ = make(write_files(tmp_path / "source", files), tmp_path / "out")
    kept = stored(tmp_path / "out")
    for name, data in files.items():
        ending, bytes_now, _ = kept[name]
        assert np.array_equal(decode(bytes_now), decode(data)), name
        assert (bytes_now == data) == (name.rpartition(".")[2] in ("jpg", "png", "webp")), name
        assert ending == {"gif": "png", "tif": "png", "bmp": "png", "ppm": "png"}.get(
            name[-3:], name.rpartition(".")[2]
        )
    assert sorted(set(zip(index.height.tolist(), index.width.tolist(), strict=True))) == [(9, 14), (14, 9)]


def test_an_ending_that_lies_does_no_harm(tmp_path):
    make(write_files(tmp_path / "source", {"a.jpg": image(kind="PNG")}), tmp_path / "out")
    assert stored(tmp_path / "out")["a.jpg"][0] == "png"


@pytest.mark.parametrize("form", ["jpg", "png", "webp"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_format_mode_and_size_are_obeyed(tmp_path, form, mode):
    files = {
        "big.png": image(0, "PNG", 40, 60),
        "tall.jpg": image(1, "JPEG", 60, 31),
        "small.png": image(2, "PNG", 10, 12),
    }
    (index,), _ = make(write_files(tmp_path / "source", files), tmp_path / "out", format=form, mode=mode, size=20)
    sizes = set()
    for ending, data, _ in stored(tmp_path / "out").values():
        assert ending == form
        with Image.open(io.BytesIO(data)) as picture:
            sizes.add(picture.size)
            assert picture.mode == ("RGB" if form == "webp" else mode)  # WebP has no grey
    assert sizes == {(30, 20), (20, 39), (12, 10)}
    assert index.mode == mode
    assert check_folder(tmp_path / "out", report=lambda _: None) == 0


def test_a_finished_folder_is_left_alone_and_another_command_refused(source, tmp_path):
    first, _ = make(source, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again, lines = make(source, tmp_path / "out")
    assert lines == [f"{tmp_path / 'out'}: already complete"]
    assert [index.split for index in again] == [index.split for index in first]
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert "was begun with size None, now 8" in refused(source, tmp_path / "out", size=8)
    write_files(source, {"train/cat/new.jpg": image(9)})
    assert "was begun with source" in refused(source, tmp_path / "out")
    (tmp_path / "foreign").mkdir()
    shutil.copy(tmp_path / "out" / "train-000000.tar", tmp_path / "foreign")
    assert "did not make" in refused(source, tmp_path / "foreign")


def test_a_lost_shard_is_made_again(source, tmp_path):
    make(source, tmp_path / "out", per_shard=4)
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "train-000001.tar").unlink()
    make(source, tmp_path / "out", per_shard=4)
    assert contents(tmp_path / "out") == before


def test_killed_at_any_moment_it_goes_on_and_gives_the_same_bytes(tmp_path):
    files = {f"{split}/{i % 3}/{i}.jpg": image(i) for split in ("train", "test") for i in range(150)}
    source, out = write_files(tmp_path / "source", files | {"train/0/bad.jpg": b"<html>"}), tmp_path / "out"
    make(source, tmp_path / "whole", per_shard=8, workers=1)
    command = [sys.executable, "-c", MAKE, str(source), str(out), json.dumps({"per_shard": 8, "workers": 1})]
    for shards in (0, 5, 15, 25, 32):
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while run.poll() is None and not (out.is_dir() and len(list(out.glob("*.tar"))) >= shards):
            time.sleep(0.001)
        if run.poll() is None:
            os.kill(run.pid, signal.SIGKILL)
        killed = run.wait() == -signal.SIGKILL
        if killed and not (out / "make.json").exists() and shards:
            with pytest.raises(ShardError, match="unfinished"):
                read_index(out, "train")
            with pytest.raises(ShardError, match="unfinished"):
                index_folder(out, report=lambda _: None)
    make(source, out, per_shard=8, workers=1)
    assert contents(out) == contents(tmp_path / "whole")
    assert not list(out.glob("*.part"))


def test_a_full_disk_is_one_line_and_the_rerun_goes_on(source, tmp_path, monkeypatch):
    make(source, tmp_path / "whole", per_shard=5)
    synced = []

    def full(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 6:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(write.os, "fsync", full)
    assert "No space left on device" in refused(source, tmp_path / "out", per_shard=5)
    assert not list((tmp_path / "out").glob("*.part"))
    monkeypatch.undo()
    make(source, tmp_path / "out", per_shard=5)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_shards_close_at_their_size_in_mib(tmp_path):
    files = {f"{i}.png": image(i, "PNG", 400, 400) for i in range(5)}  # 480 kB each
    (index,), _ = make(write_files(tmp_path / "source", files), tmp_path / "out", shard_mib=1)
    assert np.bincount(index.shard).tolist() == [3, 2]


def test_two_that_make_shards_in_one_folder_do_not_mix(source, tmp_path, monkeypatch):
    second = []

    def meanwhile(*arguments) -> list:
        second.append(refused(source, tmp_path / "out"))
        return understand(*arguments)

    understand = write.understand
    monkeypatch.setattr(write, "understand", meanwhile)
    make(source, tmp_path / "out")
    assert "another `mpp shards make` is writing there" in second[0]
    assert not (tmp_path / "out" / ".lock").exists()


def test_no_split_of_an_unfinished_folder_passes_for_complete(source, tmp_path):
    make(source, tmp_path / "out")
    (tmp_path / "out" / "make.json").rename(tmp_path / "out" / "make.unfinished.json")  # as just before the end
    with pytest.raises(ShardError, match="unfinished"):
        read_index(tmp_path / "out", "test")
    make(source, tmp_path / "out")
    assert len(read_index(tmp_path / "out", "test")) == 12


def test_the_source_itself_or_a_file_is_no_place_for_shards(source, tmp_path):
    assert "is the source itself" in refused(source, source)
    write_files(tmp_path, {"file": b""})
    assert "file: cannot be written to: File exists" in refused(source, tmp_path / "file")
    assert "file/out: cannot be written to: Not a directory" in refused(source, tmp_path / "file" / "out")


def test_images_of_extreme_shapes_are_kept_or_named(tmp_path):
    shapes = {"dot.jpg": (1, 1), "long.jpg": (20, 20_000), "tall.jpg": (20_000, 20)}
    files = {name: image(0, h=h, w=w) for name, (h, w) in shapes.items()}
    source = write_files(tmp_path / "source", files)
    (index,), _ = make(source, tmp_path / "a", size=32)
    assert sorted(zip(index.height.tolist(), index.width.tolist(), strict=True)) == sorted(shapes.values())
    (index,), _ = make(source, tmp_path / "b", size=10, mode="L")
    assert sorted(index.height.tolist()) == [1, 10, 10_000]
    (index,), lines = make(source, tmp_path / "c", format="webp")
    assert len(index) == 1
    assert any(line.startswith("left out: long.jpg: cannot be stored as webp") for line in lines)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 pages of 4 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system can only be mounted by root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("pages", [0, 1, 3, 12, 17])
def test_a_disk_that_is_full_is_one_line_and_with_space_the_same_shards_come_out(tmp_path, small_disk, pages):
    source = write_files(tmp_path / "source", {f"{c}/{i}.jpg": image(i) for c in "ab" for i in range(8)})
    make(source, tmp_path / "whole", per_shard=4)
    space = os.statvfs(small_disk)
    (small_disk / "ballast").write_bytes(bytes((space.f_bavail - pages) * space.f_frsize))
    command = [sys.executable, "-m", "mpp", "shards", "make", str(source), str(small_disk / "out"), "--per-shard", "4"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2
    said = [line for line in run.stderr.splitlines() if line.startswith("mpp: ")]
    assert len(said) == 1
    assert "No space left on device" in said[0]
    assert "Traceback" not in run.stderr
    assert not list(small_disk.rglob("*.part"))
    with pytest.raises(UserError):
        read_index(small_disk / "out", "train")
    (small_disk / "ballast").unlink()
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert contents(small_disk / "out") == contents(tmp_path / "whole")


def test_keys_stay_when_other_images_come_or_go(source, tmp_path):
    (_, before), _ = make(source, tmp_path / "a", per_shard=5)
    write_files(source, {f"train/cat/new{i}.jpg": image(90 + i) for i in range(3)})
    (source / "train/dog/1.jpg").unlink()
    (_, after), _ = make(source, tmp_path / "b", per_shard=5)
    gone = hashlib.blake2b(b"train/dog/1.jpg").hexdigest()[:16]
    old, new = ([index.key(i) for i in range(len(index))] for index in (before, after))
    assert set(old) - set(new) == {gone}
    assert len(new) == len(old) + 2
    assert new == sorted(new)


def test_shards_with_running_numbers_stay_but_are_not_gone_on_with(source, tmp_path):
    """As an earlier mpp made them: its plan says nothing about keys."""
    make(source, tmp_path / "out", per_shard=4)
    plan = json.loads((tmp_path / "out/make.json").read_bytes())
    assert plan.pop("keys")
    (tmp_path / "out/make.json").write_text(json.dumps(plan))
    _, lines = make(source, tmp_path / "out", per_shard=4)
    assert lines == [f"{tmp_path / 'out'}: already complete"]
    (tmp_path / "out/train-000001.tar").unlink()
    assert "was begun with keys 'running numbers', now" in refused(source, tmp_path / "out", per_shard=4)


@pytest.mark.parametrize(
    ("source", "out"),
    [("digits", "digits"), ("digits", "./digits"), ("digits", "digits/shards"), ("CIFAR10", "CIFAR10")],
)
def test_an_out_that_would_make_a_path_of_the_sources_name_is_refused_and_not_made(source, out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ShardError, match="is the source itself"):
        write.make_shards(source, out, report=lambda line: None, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_command_leaves_no_folder_behind(tmp_path):
    with pytest.raises(ShardError, match="nowhere: not found"):
        write.make_shards(tmp_path / "nowhere", tmp_path / "a/b/out", report=lambda line: None, progress=False)
    with pytest.raises(UserError, match="x.tar: "):
        index_urls([f"http://127.0.0.1:9/{'x' * 10}.tar"], tmp_path / "c/d", retry=Retry(attempts=1))
    assert list(tmp_path.iterdir()) == []
