"""mpp/data/write.py: what comes out of `mpp shards make` is read back by tarfile, webdataset and Pillow."""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from mpp.data import write
from mpp.data.decode import decode
from mpp.data.index import ShardError, check_folder, index_folder, read_index
from mpp.data.write import make_shards

MAKE = (
    "import sys, json; from mpp.data.write import make_shards; make_shards(*sys.argv[1:3], **json.loads(sys.argv[3]))"
)


def image(seed: int = 0, kind: str = "JPEG", h: int = 12, w: int = 16) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8)
    Image.fromarray(pixels).save(data := io.BytesIO(), kind)
    return data.getvalue()


def write_files(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def make(source: Path | str, out: Path, **options) -> tuple[list, list[str]]:
    lines: list[str] = []
    return make_shards(source, out, progress=False, report=lines.append, **options), lines


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in sorted(folder.glob("*")) if path.suffix in (".tar", ".safetensors")
    }


def stored(folder: Path) -> dict[str, tuple[str, bytes, str | None]]:
    """{source: (ending, bytes, class)} of all shards by Python's tarfile."""
    found = {}
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for name in (name for name in members if name.endswith(".json")):
            key, facts = name.removesuffix(".json"), json.loads(members[name])
            ending = next(e for e in ("jpg", "png", "webp") if f"{key}.{e}" in members)
            found[facts["source"]] = (ending, members[f"{key}.{ending}"], facts["class"])
    return found


CLASSES = {
    f"{split}/{name}/{i}.jpg": image(i) for split in ("train", "test") for name in ("cat", "dog") for i in range(6)
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_files(tmp_path / "source", CLASSES)


def refused(source: Path | str, out: Path, **options) -> str:
    with pytest.raises(ShardError) as caught:
        make(source, out, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
    assert [index.key(i) for i in range(3)] == ["00000000", "00000001", "00000002"]
    with tarfile.open(tmp_path / "a" / "train-000000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in tar} == {(0, 0, 0, "", 0o644)}


def archive(source: Path, ending: str, tmp_path: Path) -> Path:
    path = tmp_path / ("archive" + ending)
    if ending == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
            for file in sorted(source.rglob("*.*")):
                packed.write(file, file.relative_to(source).as_posix())
    else:
        with tarfile.open(path, "w:" + ending.removeprefix(".tar").removeprefix(".").replace("tgz", "gz")) as packed:
            packed.add(source, ".")
    return path


@pytest.mark.parametrize("ending", [".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2"])
def test_an_archive_gives_the_images_of_its_folder(source, tmp_path, ending):
    make(archive(source, ending, tmp_path), tmp_path / "out", per_shard=5)
    make(source, tmp_path / "folder", per_shard=5)
    by_path = {name.removeprefix("./"): value for name, value in stored(tmp_path / "out").items()}
    assert by_path == stored(tmp_path / "folder")
    assert not (tmp_path / "out" / "source.tar.part").exists()


@pytest.mark.parametrize(
    ("names", "splits", "classes"),
    [
        (["a.jpg", "b.JPG", "c.JpEg"], {"train": 3}, ()),
        (["cats/a.jpg", "dogs/sub/b.jpg"], {"train": 2}, ("cats", "dogs")),
        (["wrap/cats/a.jpg", "wrap/dogs/b.jpg"], {"train": 2}, ("cats", "dogs")),
        (
            ["wrap/Train/x/a.jpg", "wrap/VALID/x/b.jpg", "wrap/test/y/c.jpg"],
            {"train": 1, "val": 1, "test": 1},
            ("x", "y"),
        ),
        (["validation/a.jpg", "train/b.jpg"], {"train": 1, "val": 1}, ()),
        (["train/10/a.jpg", "train/9/b.jpg"], {"train": 2}, ("9", "10")),
        (["train/a.jpg", "trainannot/a.png", "notes.txt"], {"train": 1}, ()),
        (["wrap/deep/a.jpg", "wrap/deep/b.jpg"], {"train": 2}, ()),
    ],
)
def test_the_layout_says_splits_and_classes(tmp_path, names, splits, classes):
    source = write_files(tmp_path / "source", {name: image(i) for i, name in enumerate(names)})
    indexes, _ = make(source, tmp_path / "out")
    assert {index.split: len(index) for index in indexes} == splits
    assert all(index.classes == classes for index in indexes)


def test_labels_none_leaves_labels_out(source, tmp_path):
    indexes, lines = make(source, tmp_path / "out", labels="none")
    assert all(index.classes == () and set(index.label) == {-1} for index in indexes)
    assert lines[1] == "labels: none"
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        assert not [name for name in tar.getnames() if name.endswith("cls")]


def test_what_is_no_image_is_counted_and_macos_junk_is_passed_over(tmp_path):
    files = {
        "x/a.jpg": image(),
        "y/b.jpg": image(1),
        "readme.txt": b"hi",
        "x/.DS_Store": b"",
        "__MACOSX/x/._a.jpg": b"",
    }
    _, lines = make(write_files(tmp_path / "source", files | {"x/._a.jpg": b"?"}), tmp_path / "out")
    assert "left out: 1 files that are no images, such as readme.txt" in lines
    assert sorted(stored(tmp_path / "out")) == ["x/a.jpg", "y/b.jpg"]


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


def test_digits_are_scikit_learns_images(tmp_path):
    from sklearn.datasets import load_digits

    (test, train), _ = make("digits", tmp_path / "out")
    data = load_digits()
    assert (len(train), len(test), train.classes) == (1442, 355, tuple("0123456789"))
    assert np.bincount(test.label).tolist() == [count // 5 for count in np.bincount(data.target)]
    for name, (_, encoded, label) in list(stored(tmp_path / "out").items())[::50]:
        number = int(Path(name).stem)
        assert np.array_equal(decode(encoded, "L")[:, :, 0], np.round(data.images[number] * 255 / 16))
        assert int(label) == data.target[number]


def test_a_torchvision_dataset_is_taken_by_name(tmp_path, monkeypatch):
    from torchvision import datasets

    class Tiny(list):
        classes = ("a/b", "c")

        def __init__(self, root: str, train: bool, download: bool) -> None:
            assert root == str(tmp_path / "torchvision")
            super().__init__((Image.open(io.BytesIO(image(i))), i % 2) for i in range(4 + train))

    monkeypatch.setattr(datasets, "Tiny", Tiny, raising=False)
    (test, train), _ = make("torchvision:Tiny", tmp_path / "out")
    assert (len(test), len(train), train.classes) == (4, 5, ("a b", "c"))


def test_without_a_network_torchvision_says_which_file_to_put_where(tmp_path, monkeypatch):
    import urllib.request

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    said = refused("CIFAR10", tmp_path / "out")
    assert "cifar-10-python.tar.gz" in said
    assert str(tmp_path / "torchvision") in said


def test_names_in_archives_are_never_written(tmp_path):
    path = tmp_path / "evil.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("../../evil.jpg", "/abs/evil.jpg", "ok/../../x.jpg"):
            info = tarfile.TarInfo(name)
            info.size = len(image())
            tar.addfile(info, io.BytesIO(image()))
    make(path, tmp_path / "in" / "out")
    assert sorted(stored(tmp_path / "in" / "out")) == ["../../evil.jpg", "/abs/evil.jpg", "ok/../../x.jpg"]
    assert sorted(p.name for p in tmp_path.rglob("*.jpg")) == []


@pytest.mark.parametrize("ending", [".tar.xz", ".tar", ".zip", ".tar.gz"])
def test_a_cut_archive_is_refused_in_one_line(source, tmp_path, ending):
    path = archive(source, ending, tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    said = refused(path, tmp_path / "out")
    assert said.startswith(str(path))
    assert any(word in said for word in ("cut", "unpacked"))
    assert not list((tmp_path / "out").glob("*.tar"))


def test_links_are_followed_but_not_round_and_round_and_dead_ones_are_named(source, tmp_path):
    (source / "train" / "fox").symlink_to(source / "train" / "cat", target_is_directory=True)
    (source / "train" / "cat" / "round").symlink_to(source, target_is_directory=True)
    (source / "train" / "dog" / "dead.jpg").symlink_to(tmp_path / "absent.jpg")
    write_files(tmp_path, {"elsewhere/owl.jpg": image(50)})
    (source / "train" / "owl").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (_, train), lines = make(source, tmp_path / "out")
    assert len(train) == 12 + 6 + 1  # fox is cat once more
    assert any(line.startswith("left out: train/dog/dead.jpg: cannot be read") for line in lines)


def test_an_empty_or_missing_source_is_refused_in_one_line(tmp_path):
    empty = write_files(tmp_path / "source", {"notes.txt": b""})
    assert "no images found among 1 files; expected" in refused(empty, tmp_path / "out")
    assert "not found; expected" in refused(tmp_path / "absent", tmp_path / "out")
    assert "no archive" in refused(empty / "notes.txt", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for wrong in ({"quality": 0}, {"size": 0}, {"format": "gif"}, {"per_shard": 0}):
        assert next(iter(wrong)) in refused(empty, tmp_path / "out", **wrong)


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
