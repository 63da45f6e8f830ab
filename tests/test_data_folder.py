import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import pictures
from PIL import Image
from shard_files import write_files

import mpp.shards.pictures
from mpp.augment.input import Input
from mpp.augment.plan import centre, resize
from mpp.data.folder import open_pictures
from mpp.decode import DamagedImage, decode, decode_first
from mpp.shards.sources import open_source, understand

IMAGE = (16, 24)
MODES = ("RGB", "L")
ROTATED = 6  # EXIF's orientation


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Pictures of many sizes and formats in two classes, one outside of both, and some that are none."""
    folder = tmp_path / "photos"
    for number, size in enumerate([(16, 24), (40, 30), (7, 5), (64, 64), (300, 200), (90, 31)]):
        [picture] = pictures(1, size, seed=number)
        (folder / f"class{number % 2}").mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        exif[0x0112] = ROTATED if number in (1, 4) else 1
        name = f"{number:02d}.{'png' if number == 3 else 'jpg'}"
        Image.fromarray(picture).save(folder / f"class{number % 2}" / name, exif=exif)
    Image.new("RGBA", (20, 20), (200, 0, 0, 100)).save(folder / "loose.png")
    whole = (folder / "class0/04.jpg").read_bytes()
    write_files(
        folder, {"class0/cut.jpg": whole[: len(whole) // 2], "class1/text.jpg": b"no picture", "note.txt": b"a"}
    )
    return folder


def read(source: Path, mode: str = "RGB", share: float = 1.0, through=lambda files: files):
    """The images, labels and keys of a source, and why others are damaged. through: a change of its files."""
    images, labels = [], []
    with open_source(source, source.parent) as files:
        found, classes = understand(str(source), files, True, lambda line: None)
        options = {"mode": mode, "input": Input(IMAGE, centre=share)}
        batches, known = open_pictures(source, through(files), found, classes, 3, **options)
        for one in batches.iterate():
            images += list(one.images.permute(0, 2, 3, 1).numpy())
            labels += one.labels.tolist()
        left_out = {batches.index.key(number): why for number, why in {**known, **batches.damaged}.items()}
        keys = [key for i in range(len(batches.index)) if (key := batches.index.key(i)) not in left_out]
    return images, [classes[label] if label >= 0 else None for label in labels], keys, left_out


def by_hand(data: bytes, mode: str, share: float) -> np.ndarray:
    pixels = decode(data, mode)
    [[top, left, height, width]] = centre(np.array([pixels.shape[:2]]), IMAGE, share)
    return resize(pixels[top : top + height, left : left + width], np.empty((*IMAGE, pixels.shape[2]), np.uint8))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("share", [1.0, 0.6])
def test_pictures_are_those_of_decoding_centring_and_resizing_each_by_hand(source, mode, share):
    images, labels, keys, _ = read(source, mode=mode, share=share)
    first, second = (f"class0/0{number}.jpg" for number in (0, 2, 4)), ("1.jpg", "3.png", "5.jpg")
    assert sorted(keys) == [*first, *(f"class1/0{name}" for name in second), "loose.png"]
    assert labels == [key.split("/")[0] if "/" in key else None for key in keys]
    for pixels, key in zip(images, keys, strict=True):
        np.testing.assert_array_equal(pixels, by_hand((source / key).read_bytes(), mode, share))


@pytest.mark.parametrize("kind", ["zip", "tar", "gztar"])
def test_an_archive_gives_the_pictures_of_its_folder(source, kind):
    folder = read(source)
    archive = read(Path(shutil.make_archive(str(source), kind, source)))
    strip = {key.removeprefix("./"): why for key, why in archive[3].items()}
    assert strip == folder[3]
    order = [[key.removeprefix("./") for key in archive[2]].index(key) for key in folder[2]]
    assert [archive[1][i] for i in order] == folder[1]
    for here, there in zip(folder[0], [archive[0][i] for i in order], strict=True):
        np.testing.assert_array_equal(here, there)


def test_damage_has_the_cause_that_decoding_gives_and_is_named(source, caplog):
    with caplog.at_level(logging.WARNING):
        *_, left_out = read(source)
    assert left_out.keys() == {"class0/cut.jpg", "class1/text.jpg"}
    for key, why in left_out.items():
        with pytest.raises(DamagedImage) as caught:
            decode((source / key).read_bytes())
        assert why == str(caught.value)
        assert f"{source}: image {key} is damaged and passed over: {why}" in caplog.text


def test_what_cannot_be_read_is_left_out_whenever_that_shows(source, caplog):
    seen: list[str] = []

    def failing(files):
        def read(number: int) -> bytes:
            seen.append(name := files.names[number])
            if name == "class0/00.jpg" or (name == "class1/01.jpg" and seen.count(name) == 2):
                raise PermissionError(13, "Permission denied")
            return files.read(number)

        return files._replace(read=read)

    *_, keys, left_out = read(source, through=failing)
    assert left_out["class0/00.jpg"] == "cannot be read: Permission denied"
    assert "class1/01.jpg: cannot be read any more: Permission denied" in caplog.text
    assert len(keys) == 5
    assert not {"class0/00.jpg", "class1/01.jpg"} & set(keys)


def test_no_picture_is_decoded_twice_and_what_has_no_header_never(source, monkeypatch):
    decoded: list[bytes] = []

    def counting(data: bytes, mode: str):
        decoded.append(data)
        return decode_first(data, mode)

    monkeypatch.setattr(mpp.shards.pictures, "decode_first", counting)
    (source / "class0/cut.jpg").unlink()  # a batch in which one turns out damaged is read again without it
    read(source)
    assert len(decoded) == len(set(decoded)) == 7


def test_a_picture_that_was_changed_meanwhile_is_damaged(source):
    other = (source / "class0/02.jpg").read_bytes()
    names: list[str] = []

    def changing(files):
        def read(number: int) -> bytes:
            names.append(name := files.names[number])
            return other if name == "class0/00.jpg" and names.count(name) == 2 else files.read(number)

        return files._replace(read=read)

    *_, left_out = read(source, through=changing)
    assert "checksum" in left_out["class0/00.jpg"]
