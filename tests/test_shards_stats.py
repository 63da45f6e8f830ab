"""mpp/shards/stats.py against NumPy over images decoded by Pillow."""

import io
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shard_files import image, labelled, png, quiet, write_tar

from mpp.cli import main
from mpp.shards.build import index_folder
from mpp.shards.index import Index, read_index, write_index
from mpp.shards.stats import Stats, folder_stats
from mpp.shards.stats_table import table
from mpp.shards.tar import ShardError

SIZES = [(6, 9), (12, 4), (30, 31), (5, 5), (8, 20)]  # (h, w)


def indexed(folder: Path, splits: dict[str, list[tuple[bytes, str]]]) -> Path:
    """A folder with one shard a split of images with their labels; keys are numbers."""
    folder.mkdir(exist_ok=True)
    for split, images in splits.items():
        members = []
        for i, (data, label) in enumerate(images):
            members += [(f"{i:04d}.png", data), *([(f"{i:04d}.cls", label.encode())] if label else [])]
        write_tar(folder / f"{split}-0.tar", members)
    index_folder(folder, report=quiet)
    return folder


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) / 255  # (h, w, 3)


def stats(folder: Path, images: int | None = None) -> Stats:
    return folder_stats(folder, images, progress=False)


def colours(data: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over all pixels, each weighted so that an image weighs the same as any other."""
    v = np.concatenate([pixels(one).reshape(-1, 3) for one in data])
    weights = np.concatenate([np.full(len(p), 1 / len(p)) for p in (pixels(one).reshape(-1, 3) for one in data)])
    mean = np.average(v, axis=0, weights=weights)
    return mean, np.sqrt(np.average((v - mean) ** 2, axis=0, weights=weights))


def test_sizes_and_colours_are_those_of_the_decoded_images(tmp_path):
    data = [
        png(i, h, w, kind) for i, (h, w) in enumerate(SIZES) for kind in ("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF")
    ]
    found = stats(indexed(tmp_path, {"train": [(one, "3") for one in data]})).splits["train"]
    mean, std = colours(data)
    np.testing.assert_allclose(found.mean, mean, atol=1e-12)
    np.testing.assert_allclose(found.std, std, atol=1e-12)
    assert found.formats == dict.fromkeys(("BMP", "JPEG", "PNG", "PNM", "TIFF", "WebP"), 5)
    assert (found.images, found.shards, found.damaged, found.decoded, found.sampled) == (30, 1, 0, 30, False)
    assert found.bytes == sum(map(len, data))
    shapes = [pixels(one).shape for one in data]
    for spread, values in (
        (found.height, [h for h, _, _ in shapes]),
        (found.width, [w for _, w, _ in shapes]),
        (found.aspect, [w / h for h, w, _ in shapes]),
        (found.bytes_per_image, [len(one) for one in data]),
    ):
        ordered = sorted(values)
        expected = [ordered[round(share * 29)] for share in (0, 0.05, 0.5, 0.95, 1)]
        assert list(asdict(spread).values()) == expected


def test_with_images_of_one_size_mean_and_std_are_those_of_all_pixels(tmp_path):
    data = [png(i) for i in range(300)]  # more than one task takes
    found = stats(indexed(tmp_path, {"train": [(one, "0") for one in data]})).splits["train"]
    everything = np.stack([pixels(one) for one in data])
    np.testing.assert_allclose(found.mean, everything.mean((0, 1, 2)), atol=1e-12)
    np.testing.assert_allclose(found.std, everything.std((0, 1, 2)), atol=1e-12)


def test_grey_and_turned_images_are_counted_as_training_gets_them(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.full((4, 10, 3), 51, np.uint8)).save(turned := io.BytesIO(), "JPEG", exif=exif)
    folder = indexed(tmp_path, {"train": [(turned.getvalue(), "0")]})
    write_index(Index(**vars(read_index(folder, "train")) | {"mode": "L"}))
    found = stats(folder).splits["train"]
    assert (found.height.max, found.width.max, found.aspect.max) == (10, 4, 0.4)
    np.testing.assert_allclose(found.mean, [0.2], atol=0.005)
    assert "grey" in table(stats(folder))


def test_damaged_images_are_counted_and_left_out(tmp_path):
    good = [png(i) for i in range(3)]
    folder = indexed(tmp_path, {"train": [(one, "0") for one in [*good, png(7)[:-60], b"<html>"]]})
    assert read_index(folder, "train").damaged.sum() == 1  # only the header was looked at
    found = stats(folder).splits["train"]
    assert (found.images, found.damaged, found.decoded, found.sampled) == (5, 2, 3, False)
    np.testing.assert_allclose(found.mean, colours(good)[0], atol=1e-12)
    data = (folder / "train-0.tar").read_bytes().replace(png(1), png(99)[: len(png(1))].ljust(len(png(1)), b"\0"))
    (folder / "train-0.tar").write_bytes(data)
    assert stats(folder).splits["train"].damaged == 3  # its bytes are others than the index's
    only_bad = stats(indexed(tmp_path / "bad", {"train": [(b"<html>", "0")]}))
    assert only_bad.splits["train"].height is None
    assert "no image could be decoded" in table(only_bad)


def test_a_sample_is_drawn_by_keys_and_said_to_be_one(tmp_path):
    data = [png(i) for i in range(40)]
    folder = indexed(tmp_path, {"train": [(one, "0") for one in data]})
    found = stats(folder, 10)
    assert (found.splits["train"].decoded, found.splits["train"].sampled) == (10, True)
    assert found == stats(folder, 10)
    assert folder_stats(folder, 10, seed=1, progress=False).splits["train"].mean != found.splits["train"].mean
    assert "over a sample of 10 images" in table(found)
    assert stats(folder, 40).splits == stats(folder).splits
    with pytest.raises(ShardError, match="at least 1 image, got 0"):
        stats(folder, 0)


def test_classes_are_counted_and_those_that_a_split_lacks_are_named(tmp_path):
    train = [(png(i), ["cat", "dog", "cat", "fox"][i % 4]) for i in range(8)] + [(png(8), "")]
    found = stats(indexed(tmp_path, {"train": train, "test": [(png(9), "dog"), (png(10), "eel")]}))
    assert found.classes == ("cat", "dog", "eel", "fox")
    assert list(found.splits) == ["train", "test"]
    assert found.splits["train"].images_by_label == [4, 2, 0, 2]
    assert found.splits["train"].without_label == 1
    lines = table(found).splitlines()
    for row in (["cat", "4", "0"], ["eel", "0", "1"], ["without", "label", "1", "0"]):
        assert row in [line.split() for line in lines]
    assert "train lacks 1 of the classes: eel" in lines
    assert "test lacks 2 of the classes: cat, fox" in lines


def test_of_many_classes_the_smallest_and_largest_are_shown(tmp_path):
    labels = [str(c) for c in range(30) for _ in range(1 + c % 7)]
    folder = indexed(tmp_path, {"train": [(png(i), label) for i, label in enumerate(labels)]})
    text = table(stats(folder))
    assert "train: 30 classes with images: 1 to 7, median 4; 0 images without a label" in text
    assert "  fewest: 0 1, 7 1, 14 1, 21 1, 28 1" in text
    assert "  most: 27 7, 20 7, 13 7, 6 7, 26 6" in text
    assert "eel" not in text


def test_splits_that_number_their_classes_apart_meet_by_name(tmp_path):
    for name, labels in (("train", ["a", "b"]), ("test", ["b", "c"])):
        folder = indexed(tmp_path / name, {name: [(png(i), label) for i, label in enumerate(labels)]})
        for path in folder.iterdir():
            path.rename(tmp_path / path.name)
    found = stats(tmp_path)
    assert found.classes == ("a", "b", "c")
    assert {name: split.images_by_label for name, split in found.splits.items()} == {
        "train": [1, 1, 0],
        "test": [0, 1, 1],
    }


def test_the_command_prints_a_table_and_writes_every_figure(tmp_path, capsys):
    folder = indexed(tmp_path, {"train": [(png(1), "0"), (image(2), "1"), (png(1), "1")]})
    main(["shards", "stats", str(folder), "--json", str(tmp_path / "stats.json"), "--images", "2"])
    out = capsys.readouterr().out
    saved = json.loads((tmp_path / "stats.json").read_text())
    assert saved == json.loads(json.dumps(asdict(stats(folder, 2))))
    assert saved["splits"]["train"]["images_by_label"] == [1, 2]
    assert saved["duplicates"]["disagreeing"] == 1
    assert out == table(stats(folder, 2)) + "\n"


def test_no_shards_and_shards_without_labels(tmp_path):
    with pytest.raises(ShardError, match="no such folder"):
        stats(tmp_path / "absent")
    write_tar(tmp_path / "t-0.tar", [(name, data) for name, data in labelled(4, ["0"]) if name.endswith("png")])
    index_folder(tmp_path, report=quiet)
    assert "no labels" in table(stats(tmp_path))
