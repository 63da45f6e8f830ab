"""Images, tars, archives and folders of images that the tests of mpp/data share."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mpp.errors import UserError
from mpp.shards.build import index_folder
from mpp.shards.write import make_shards


def image(seed: int = 0, kind: str = "JPEG", h: int = 12, w: int = 16) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8)
    Image.fromarray(pixels).save(data := io.BytesIO(), kind)
    return data.getvalue()


CLASSES = {
    f"{split}/{name}/{i}.jpg": image(i) for split in ("train", "test") for name in ("cat", "dog") for i in range(6)
}


def png(seed: int = 0, h: int = 6, w: int = 9, kind: str = "PNG") -> bytes:
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
    return [m for i in keys for m in ((f"{i:04d}.png", png(i)), (f"{i:04d}.cls", labels[i % len(labels)].encode()))]


def quiet(_: str) -> None:
    pass


def three_shards(folder: Path) -> Path:
    """Three shards of two splits, indexed."""
    write_tar(folder / "train-000000.tar", labelled(5, ["0", "2"]))
    write_tar(folder / "train-000001.tar", labelled(4, ["0", "2"], start=5))
    write_tar(folder / "test-000000.tar", labelled(3, ["2"]))
    index_folder(folder, report=quiet)
    return folder


def write_files(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


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


def make(source: Path | str, out: Path, **options) -> tuple[list, list[str]]:
    lines: list[str] = []
    return make_shards(source, out, progress=False, report=lines.append, **options), lines


def refused(source: Path | str, out: Path, **options) -> str:
    with pytest.raises(UserError) as caught:
        make(source, out, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
