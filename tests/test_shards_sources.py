"""mpp/shards/sources.py: what folders, archives and data sets by name are taken for."""

import gzip
import io
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shard_files import (
    CLASSES,
    archive,
    image,
    make,
    refused,
    stored,
    write_files,
    write_tar,
)

from mpp.decode import decode
from mpp.shards import sources


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_files(tmp_path / "source", CLASSES)


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


def test_a_file_that_is_no_archive_and_a_device_are_refused(tmp_path):
    files = {
        "text.txt": b"hello " * 2000,
        "photo.jpg": image(0, h=90, w=90),
        "empty.tar": b"",
        "photo.gz": gzip.compress(b"x"),
    }
    write_files(tmp_path, files)
    for name in files:
        assert "no archive; expected" in refused(tmp_path / name, tmp_path / "out")
    assert "neither a file nor a folder" in refused("/dev/zero", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pipe_among_the_images_does_not_block(source, tmp_path):
    os.mkfifo(source / "train" / "cat" / "pipe.jpg")
    (_, train), lines = make(source, tmp_path / "out")
    assert len(train) == 12
    assert "left out: train/cat/pipe.jpg: cannot be read: no regular file" in lines


def test_links_in_an_archive_are_counted_as_left_out(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("x/a.jpg", image())])
    with tarfile.open(path, "a") as tar:
        for name, kind in (
            ("x/soft.jpg", tarfile.SYMTYPE),
            ("x/hard.jpg", tarfile.LNKTYPE),
            ("x/notes", tarfile.SYMTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "../../etc/passwd"
            tar.addfile(info)
    (index,), lines = make(path, tmp_path / "out")
    assert len(index) == 1
    assert "left out: 2 links to images, which an archive may point anywhere, such as x/soft.jpg" in lines


def test_a_damaged_member_of_a_zip_is_left_out(source, tmp_path):
    path = archive(source, ".zip", tmp_path)
    data = bytearray(path.read_bytes())
    data[100:120] = bytes(20)  # within the first image
    path.write_bytes(data)
    indexes, lines = make(path, tmp_path / "out")
    assert sum(map(len, indexes)) == 23
    assert any(line.startswith("left out: test/cat/0.jpg: cannot be read: ") for line in lines)


def test_names_with_line_breaks_and_bytes_that_are_no_text_are_kept(tmp_path):
    source = write_files(tmp_path / "source", {"a\nb/new\nline.jpg": image(1), "grüße/日本.jpg": image(2)})
    Path(os.fsdecode(os.fsencode(source) + b"/a\nb/\xff.jpg")).write_bytes(image(3))
    (index,), lines = make(source, tmp_path / "out")
    assert index.classes == ("a\nb", "grüße")
    assert set(stored(tmp_path / "out")) == {"a\nb/new\nline.jpg", "grüße/日本.jpg", "a\nb/\udcff.jpg"}
    assert not [line for line in lines if "\n" in line]


def test_a_torchvision_dataset_without_one_class_an_image_is_refused(tmp_path, monkeypatch):
    from torchvision import datasets

    class Boxes(list):
        def __init__(self, root: str) -> None:
            super().__init__([(None, {"boxes": []})])

    class Picky(list):
        def __init__(self, root: str, annotations: str) -> None:
            pass

    monkeypatch.setattr(datasets, "Boxes", Boxes, raising=False)
    monkeypatch.setattr(datasets, "Picky", Picky, raising=False)
    assert "its labels are no classes" in refused("Boxes", tmp_path / "out")
    assert "needs more than its name" in refused("Picky", tmp_path / "out")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("ending", [".zip", ".tar"])
def test_of_equal_names_in_an_archive_the_last_counts_as_when_it_is_unpacked(tmp_path, ending):
    members = [("x/a.jpg", image(1)), ("y/b.jpg", image(2)), ("x/a.jpg", image(3))]
    path = tmp_path / ("twice" + ending)
    if ending == ".zip":
        with zipfile.ZipFile(path, "w") as packed:
            for name, data in members:
                packed.writestr(name, data)
    else:
        write_tar(path, members)
    _, lines = make(path, tmp_path / "out")
    assert {name: data for name, (_, data, _) in stored(tmp_path / "out").items()} == dict(members)
    assert "left out: 1 images whose names come again further on, such as x/a.jpg" in lines


def test_files_that_would_fill_the_memory_are_left_out(source, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LARGEST_IMAGE", 100_000)
    write_files(source, {"train/cat/bomb.jpg": bytes(10**7)})
    for path in (source, archive(source, ".zip", tmp_path), archive(source, ".tar", tmp_path)):
        _, lines = make(path, tmp_path / ("out-" + path.name.replace(".", "-")))
        (line,) = [line for line in lines if "bomb" in line]
        assert line.endswith("train/cat/bomb.jpg: cannot be read: 10000000 bytes, more than the limit of 100000")
