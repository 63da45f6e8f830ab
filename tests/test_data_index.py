"""mpp/data/index.py against Python's tarfile and against tars written by webdataset's own writer."""

import io
import json
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from safetensors.numpy import save

from mpp.data.index import ARRAYS, ShardError, check_folder, index_folder, read_index, scan_shard, splits, write_index


def image(seed: int = 0, h: int = 6, w: int = 9, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8)
    Image.fromarray(pixels).save(data := io.BytesIO(), kind)
    return data.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def labelled(n: int, labels: list[str], start: int = 0) -> list[tuple[str, bytes]]:
    keys = range(start, start + n)
    return [m for i in keys for m in ((f"{i:04d}.png", image(i)), (f"{i:04d}.cls", labels[i % len(labels)].encode()))]


def quiet(_: str) -> None:
    pass


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
        assert in_tarfile(folder, index, i) == image(i)
        assert index.crc32[i] == zlib.crc32(image(i))
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
            writer.write(
                {"__key__": f"deep/er.dir/{i}", "jpg": image(i, kind="JPEG"), "cls": i % 3, "json": {"a": [i]}}
            )
    (index,) = index_folder(tmp_path, report=quiet)
    assert (index.split, len(index), len(index.shards)) == ("photos", 10, 3)
    assert index.label.tolist() == [i % 3 for i in range(10)]
    assert index.key(7) == "deep/er.dir/7"
    assert all(in_tarfile(tmp_path, index, i) == image(i, kind="JPEG") for i in range(10))


def test_tars_of_img2dataset_get_the_split_that_is_asked_for(tmp_path):
    for shard in range(2):
        members = []
        for i in range(3):
            key = f"{shard:05d}{i:04d}"
            members += [
                (f"{key}.jpg", image(i, kind="JPEG")),
                (f"{key}.txt", b"a cat"),
                (f"{key}.json", b'{"caption": 1}'),
            ]
        write_tar(tmp_path / f"{shard:05d}.tar", members)
    assert [index.split for index in index_folder(tmp_path, report=quiet)] == ["train"]
    (index,) = index_folder(tmp_path, split="web", report=quiet)
    assert (index.split, len(index), index.classes, set(index.label)) == ("web", 6, (), {-1})


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_are_read_as_tarfile_reads_them(tmp_path, form):
    names = ["d" * 90 + "/" + "k" * 60 + ".png", "short.png"]
    if form != tarfile.USTAR_FORMAT:
        names += ["x" * 300 + "/" + "y" * 200 + ".png", "grüße/日本.png"]
    path = write_tar(tmp_path / "t-0.tar", [(name, image(i)) for i, name in enumerate(names)], form)
    assert [sample.key for sample in scan_shard(path).samples] == [name.removesuffix(".png") for name in names]
    with tarfile.open(path) as tar:
        assert [m.offset_data for m in tar] == [sample.offset for sample in scan_shard(path).samples]


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"
)  # webdataset's
def test_samples_are_grouped_as_webdataset_groups_them(tmp_path):
    members = [
        ("a.b/one.JPG", image(1, kind="JPEG")), ("a.b/one.cls", b"3\n"), ("a.b/one.seg.png", image(2)),
        ("two.txt", b"no image"), ("three.webp", image(3, kind="WEBP")), ("__meta__", b"?"), ("noending", b"?"),
    ]  # fmt: skip
    path = write_tar(tmp_path / "t-0.tar", members)
    scan = scan_shard(path)
    assert [(s.key, s.label, s.size) for s in scan.samples] == [
        ("a.b/one", "3", len(members[0][1])),
        ("three", "", len(members[4][1])),
    ]
    assert scan.without_image == 1
    keys = [s["__key__"] for s in webdataset.WebDataset(str(path), shardshuffle=False)]
    assert keys == ["a.b/one", "two", "three"]


def test_folders_and_links_in_a_tar_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "t-0.tar", "w") as tar:
        for name, kind in (("dir", tarfile.DIRTYPE), ("link.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.png"
            tar.addfile(info)
        info = tarfile.TarInfo("a.png")
        info.size = len(image())
        tar.addfile(info, io.BytesIO(image()))
    assert [sample.key for sample in scan_shard(tmp_path / "t-0.tar").samples] == ["a"]


def test_hostile_keys_are_only_names(tmp_path):
    inside = tmp_path / "in"
    inside.mkdir()
    write_tar(inside / "t-0.tar", [("../../evil.png", image()), ("/etc/passwd.png", image()), ("a\nb.png", image())])
    (index,) = index_folder(inside, report=quiet)
    assert [index.key(i) for i in range(3)] == ["../../evil", "/etc/passwd", "a\nb"]
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["in", "t-0.tar", "t-index.safetensors"]


@pytest.mark.parametrize("cut", [100, 700, 5000, -1024, -10_000])
def test_a_cut_tar_is_refused_with_the_byte_where_it_ends(tmp_path, cut):
    path = write_tar(tmp_path / "t-000007.tar", [(f"{i}.png", image(i, 40, 40)) for i in range(4)])
    with tarfile.open(path) as tar:
        end = max(m.offset_data + -(-m.size // 512) * 512 for m in tar)
    data = path.read_bytes()[: end if cut == -1024 else cut]  # -1024: only the end mark is gone
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"t-000007\.tar") as caught:
        index_folder(tmp_path, report=quiet)
    assert str(len(data)) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not splits(tmp_path)


def test_a_tar_with_a_changed_header_or_a_foreign_file_is_refused(tmp_path):
    path = write_tar(tmp_path / "t-0.tar", labelled(3, ["0"]))
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match="no tar header at byte 0"):
        scan_shard(path)
    path.write_bytes(b"\x1f\x8b" + bytes(range(256)) * 8)
    with pytest.raises(ShardError, match="no tar header at byte 0"):
        scan_shard(path)


def test_a_key_that_occurs_twice_is_refused_with_its_shards(tmp_path):
    for shard in range(2):
        write_tar(tmp_path / f"t-{shard}.tar", [("same.png", image(shard))])
    with pytest.raises(ShardError, match=r"key same occurs 2 times in t: in t-0\.tar, t-1\.tar"):
        index_folder(tmp_path, report=quiet)
    write_tar(tmp_path / "t-0.tar", [("a.png", image()), ("a.png", image())])
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


def test_check_lists_each_bad_image_with_shard_key_and_cause_and_marks_it(tmp_path):
    cut = image(1)[:-60]
    write_tar(tmp_path / "t-0.tar", [("good.png", image(0)), ("cut.png", cut), ("page.jpg", b"<html>")])
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


def test_check_finds_bytes_that_changed_behind_the_index(folder):
    path = folder / "test-000000.tar"
    write_tar(path, [(f"{i:04d}.{e}", d) for i in range(3) for e, d in (("png", image(i + 50)), ("cls", b"2"))])
    lines: list[str] = []
    assert check_folder(folder, report=lines.append) == 3
    assert "checksum" in lines[0]


def test_class_names_in_json_are_kept_and_other_json_does_no_harm(tmp_path):
    facts = [json.dumps({"class": "cat"}).encode(), b"[1]", b"not json", b'{"class": 5}']
    members = [
        m for i, f in enumerate(facts) for m in ((f"{i}.png", image(i)), (f"{i}.cls", b"%d" % i), (f"{i}.json", f))
    ]
    write_tar(tmp_path / "t-0.tar", members)
    (index,) = index_folder(tmp_path, report=quiet)
    assert index.classes == ("cat", "1", "2", "3")


def test_integers_too_large_for_classes_are_refused(tmp_path):
    write_tar(tmp_path / "t-0.tar", labelled(2, ["123456789012"]))
    with pytest.raises(ShardError, match="no classes"):
        index_folder(tmp_path, report=quiet)
