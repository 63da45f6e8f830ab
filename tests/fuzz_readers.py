"""What `fuzz.py` reads: for each reader of files of strangers valid files to start from, ways to spoil them, and how
a file is read as a user would have it read."""

import argparse
import gzip
import io
import json
import socket
import tarfile
import threading
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import aiohttp  # noqa: F401 (imported late by mpp: here before anything is watched)
import fsspec.implementations.http  # noqa: F401
import fuzz_mutations as ways
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load

import mpp
from mpp import checkpoint, log
from mpp.decode import MAX_PIXELS, DamagedImage, decode, image_size
from mpp.errors import UserError
from mpp.eval.compare.chains import probed_weights, read_rows
from mpp.eval.compare.machine import Machine
from mpp.export import origin
from mpp.models.classifier import Classifier, Head
from mpp.models.vit import ViT
from mpp.models.vit_config import ViTConfig
from mpp.recipe.settled import imports_of, load_settled
from mpp.remote.fetch import Retry, fetch
from mpp.shards.build import index_folder
from mpp.shards.index import SUFFIX, read_index
from mpp.shards.sources import READ_ERRORS, open_source, understand
from mpp.shards.write import make_shards
from mpp.weights import own
from mpp.weights.foreign import FORMATS

FACTS = {"image": (8, 8), "patch": 4, "width": 16, "depth": 2, "heads": 2}
WRITTEN = {format.NAME: format for format in FORMATS if hasattr(format, "write")}


class Reader(NamedTuple):
    seeds: Callable[[Path], Sequence[bytes]]  # makes valid files
    ways: Sequence[ways.Mutation]
    read: Callable[[Path, bytes], object]  # in a folder of its own; UserError is an answer, and `answers` are
    answers: tuple[type[Exception], ...] = ()
    share: int = 1  # of all inputs: more of what is read in a moment
    memory: int = 2**30  # bytes that reading may take; files here are below 1 MiB, and budget.RATIO_FREE is 2**28


# Weights


def _classifier(**facts) -> Classifier:
    torch.manual_seed(0)
    encoder = ViT(ViTConfig(**{**FACTS, **facts}))
    return Classifier(encoder, Head(encoder.width, 3), ["cat", "dog", "=1"])


def _written(format: str, file: str, **facts) -> bytes:
    made = _classifier(**facts)
    contents = WRITTEN[format].write(made.encoder, made.head, made.classes)
    return contents[file] if isinstance(contents[file], bytes) else contents[file].encode()


def _npz(folder: Path) -> Sequence[bytes]:
    google = {"gelu": "tanh", "class_token": True}
    return [_written("google", "model.npz", **google), _written("google", "model.npz", pool="avg", gelu="tanh")]


def _states() -> list[object]:
    state = load(_written("timm", "model.safetensors"))
    half = {name: tensor.half() for name, tensor in state.items()}
    settings = argparse.Namespace(model="vit_tiny", lr=1e-3, nested={"a": [1, 2]}, flag=True, none=None)
    teacher = {"backbone." + name: tensor for name, tensor in state.items() if "head" not in name} | {
        "head.last": torch.ones(3)
    }
    optimizer = {"state": {i: {"step": torch.tensor(1.0), "exp_avg": torch.ones(2, 2)} for i in range(3)}}
    return [
        state,
        {"model": half, "args": settings, "optimizer": optimizer, "epoch": 3},
        {"teacher": teacher, "student": teacher, "epoch": np.float64(3)},
        {"state_dict": {"module." + name: torch.nn.Parameter(tensor) for name, tensor in state.items()}},
    ]


def _torch(folder: Path, new: bool) -> Sequence[bytes]:
    made = []
    for state in _states():
        torch.save(state, file := io.BytesIO(), _use_new_zipfile_serialization=new)
        made.append(file.getvalue())
    return made


def _safetensors(folder: Path) -> Sequence[bytes]:
    own.save_encoder(_classifier().encoder, folder / "encoder")
    own.save_classifier(_classifier(), folder / "classifier")
    written = [_written("timm", "model.safetensors"), _written("huggingface", "model.safetensors")]
    return [(folder / "encoder").read_bytes(), (folder / "classifier").read_bytes(), *written]


def _weights(folder: Path, data: bytes) -> None:
    (folder / "x").write_bytes(data)
    facts = {} if b'"encoder"' in data[:200] else {"heads": 2}  # our own files tell everything themselves
    try:
        mpp.load_classifier(folder / "x", **facts)
    except UserError:
        mpp.load_encoder(folder / "x", **facts)


def _config(folder: Path) -> Sequence[bytes]:
    names = {"huggingface": ("config.json", "preprocessor_config.json"), "timm": ("config.json",)}
    index = {"weight_map": dict.fromkeys(load(_weights_of("timm")), "part.safetensors")}
    # The first word says what the file is, and beside which weights it lies.
    return [
        *(f"{format} {name}\n".encode() + _written(format, name) for format in names for name in names[format]),
        b"timm model.safetensors.index.json\n" + json.dumps(index).encode(),
    ]


def _beside(random, data: bytes) -> bytes:
    head, _, text = data.partition(b"\n")
    return head + b"\n" + random.choice((ways.json_text, ways.json_text, *ways.BLIND))(random, text)


def _folder(folder: Path, data: bytes) -> None:
    head, _, text = data.partition(b"\n")
    format, name = head.decode().split()
    for file in folder.iterdir():
        file.unlink()
    (folder / ("part" if "index" in name else "model")).with_suffix(".safetensors").write_bytes(_weights_of(format))
    (folder / name).write_bytes(text)
    mpp.load_encoder(folder, heads=2)


_kept: dict[str, bytes] = {}


def _weights_of(format: str) -> bytes:
    return _kept.setdefault(format, _kept.get(format) or _written(format, "model.safetensors"))


# Images and data


def _image(kind: str, mode: str = "RGB", **how) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (13, 17, 4), np.uint8)
    Image.fromarray(pixels[..., :3] if mode != "RGBA" else pixels).convert(mode).save(data := io.BytesIO(), kind, **how)
    return data.getvalue()


def _of_images(kind: str) -> Reader:
    spoil = (ways.png, *ways.BLIND) if kind == "png" else ways.BLIND
    return Reader(partial(_images, kind), spoil, _decoded, (DamagedImage,), 4, 12 * MAX_PIXELS)


def _exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif.tobytes()


def _images(kind: str, folder: Path) -> Sequence[bytes]:
    if kind == "jpeg":
        exif = _image("JPEG", exif=_exif())
        return [_image("JPEG"), exif, _image("JPEG", "L"), _image("JPEG", "CMYK"), _image("JPEG", progressive=True)]
    if kind == "png":
        return [_image("PNG", mode) for mode in ("RGB", "RGBA", "L", "P", "1")] + [_image("PNG", exif=_exif())]
    if kind == "webp":
        return [_image("WEBP"), _image("WEBP", "RGBA", lossless=True), _image("WEBP", exif=_exif())]
    if kind == "tiff":
        hows = [{}, {"compression": "tiff_lzw"}, {"compression": "jpeg"}, {"compression": "tiff_adobe_deflate"}]
        return [_image("TIFF", **how) for how in hows] + [_image("TIFF", "1", compression="group4")]
    frames = [Image.fromarray(np.full((9, 9), value, np.uint8)) for value in (3, 200)]
    frames[0].save(gif := io.BytesIO(), "GIF", save_all=True, append_images=frames[1:], transparency=3)
    plain = b"P3\n2 2 255\n1 2 3 4 5 6 7 8 9 10 11 12\n"
    rest = [("BMP", "RGB"), ("BMP", "P"), ("BMP", "1"), ("GIF", "P"), ("PPM", "RGB"), ("PPM", "L")]
    return [_image(name, mode) for name, mode in rest] + [gif.getvalue(), plain]


def _decoded(folder: Path, data: bytes) -> None:
    try:
        size = image_size(data)
    except DamagedImage:
        size = None
    for mode in ("RGB", "L"):
        pixels = decode(data, mode)
        assert pixels.shape == (*size, 3 if mode == "RGB" else 1), (pixels.shape, size)


def _members() -> list[tuple[str, bytes]]:
    facts = json.dumps({"class": "cat", "width": 17, "height": 13, "a": {"b": 3}}).encode()
    return [
        ("train/0001.jpg", _image("JPEG")), ("train/0001.cls", b"0"), ("train/0001.json", facts),
        ("train/0002.png", _image("PNG")), ("train/0002.cls", b"1"), ("train/0003.webp", _image("WEBP")),
    ]  # fmt: skip


def _tars(folder: Path) -> Sequence[bytes]:
    made = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(fileobj=(file := io.BytesIO()), mode="w", format=form) as tar:
            for name, data in _members():
                info = tarfile.TarInfo(name if form == tarfile.USTAR_FORMAT else "ü" * 120 + name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        made.append(file.getvalue())
    return made


INSIDE = {
    ".json": (ways.json_text, *ways.BLIND),
    ".png": (ways.png, *ways.BLIND),
    ".npy": (ways.npy,),
    "pkl": (ways.pickled,),
}


def _indexed(folder: Path, data: bytes) -> None:
    (folder / "train-000000.tar").write_bytes(data)
    for choice in ("cls", "json:a.b", "name"):
        (folder / f"train{SUFFIX}").unlink(missing_ok=True)
        index_folder(folder, labels=choice, report=_quiet)
    _read_all(folder)


def _read_all(folder: Path) -> None:
    batches = mpp.read_shards(folder, 2, image=(8, 8), train=False, reader="indexed", threads=1)
    for batch in batches.iterate():
        assert batch.images.shape[1:] == (3, 8, 8)


def _indexes(folder: Path) -> Sequence[bytes]:
    (folder / "train-000000.tar").write_bytes(_tars(folder)[0])
    index_folder(folder, report=_quiet)
    return [(folder / f"train{SUFFIX}").read_bytes()]


def _of_index(folder: Path, data: bytes) -> None:
    tar = folder / "train-000000.tar"
    tar.exists() or tar.write_bytes(_tars(folder)[0])
    (folder / f"train{SUFFIX}").write_bytes(data)
    index = read_index(folder, "train")
    [index.key(i) for i in range(min(len(index), 9))]
    _read_all(folder)


def _archives(folder: Path) -> Sequence[bytes]:
    made = []
    for how in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(file := io.BytesIO(), "w", how) as archive:
            for name, data in _members():
                archive.writestr(name, data)
        made.append(file.getvalue())
    return [*made, gzip.compress(_tars(folder)[0]), _tars(folder)[1]]


def _archive(random, data: bytes) -> bytes:
    if data[:2] == b"PK":
        return ways.zip_member(random, data, INSIDE)
    if data[:2] == b"\x1f\x8b":
        return ways.packed(random, data, (partial(ways.tar_member, ways=INSIDE), *ways.BLIND))
    return ways.tar_member(random, data, INSIDE)


def _source(folder: Path, data: bytes) -> None:
    (folder / "x").write_bytes(data)
    with open_source(folder / "x", folder) as files:
        pictures, _ = understand("x", files, True, _quiet)
        for picture in pictures[:50]:
            try:
                decode(files.read(picture.number))
            except (DamagedImage, *READ_ERRORS):  # both are left out, with their cause
                continue


def _makings(folder: Path) -> Sequence[bytes]:
    source = _makings_source(folder)
    make_shards(source, folder / "out", report=_quiet, progress=False)
    return [(folder / "out/make.json").read_bytes()]


def _makings_source(folder: Path) -> Path:
    source = folder / "source"
    if not source.exists():
        (source / "cat").mkdir(parents=True)
        (source / "cat/1.jpg").write_bytes(_image("JPEG"))
    return source


def _made(folder: Path, data: bytes) -> None:
    source, out = _makings_source(folder), folder / "out"
    out.mkdir(exist_ok=True)
    (out / "make.json").write_bytes(data)
    make_shards(source, out, report=_quiet, progress=False)


def _quiet(_: str) -> None:
    pass


# Runs


RECIPE = """# A recipe.
base: base.yaml
seed: 3
data:
  path: x
  mix: {more: {path: y, train: train, weight: 2}}
model: {image: 32, patch: 8, width: 32, depth: 2, heads: 2, mixer: [attention], pool: avg}
objective: {name: mpp, share: 0.5, split: [0.8, 0.1, 0.1]}
train:
  epochs: 3
  lr: 1.0e-3
"""
LABELS = """
data: {path: x}
model: {preset: Ti/8, image: 32}
objective: {name: labels, classes: [cat, "dog", 3x], smoothing: 0.1}
train: {steps: 10, batch: 8}
"""


def _recipes(folder: Path) -> Sequence[bytes]:
    return [RECIPE.encode(), LABELS.encode()]


def _recipe(folder: Path, data: bytes) -> None:
    (folder / "base.yaml").write_text("train: {batch: 8}\n")
    (folder / "x.yaml").write_bytes(data)
    mpp.load_recipe(folder / "x.yaml")


def _settled(folder: Path) -> Sequence[bytes]:
    facts = {
        "format": 1, "images": "3 images, 0", "labels": None, "weights": None, "objective": {}, "steps": 3, "warmup": 1,
        "shuffle": "all", "prepare": "cpu", "imports": {"objective.name": "x.py"},
        "execution": {"device": "cpu", "precision": "float32", "compile": False, "micro_batch": 4},
    }  # fmt: skip
    rows = {
        "format": 1, "weights": "ab", "asked": [[1.0, "knn"]], "data": "x", "train": 3, "test": 3, "train_images": 3,
        "rows": [{"protocol": "knn", "fraction": 1.0, "metric": "top1", "value": 0.5}],
    }  # fmt: skip
    machine = {"format": 1, "choices": {"micro_batch pretrain": 4, "shuffle": "all"}}
    scores = {"n": 3, "top1": 0.5, "top5": 1.0, "loss": 1.0, "ece": 0.1, "per_class": [0.5], "classes": ["a"]}
    return [json.dumps(one).encode() for one in (facts, rows, machine, scores)]


def _json_beside(folder: Path, data: bytes) -> None:
    """As every file that holds JSON in a run or a comparison."""
    for name in ("settled.json", "machine.json", "results.json"):
        (folder / name).write_bytes(data)
    imports_of(folder)
    read_rows(folder / "results.json")
    probed_weights(folder / "results.json")
    list(origin._measured(folder, None))
    for read in (lambda: load_settled(folder), lambda: Machine(folder).known()):
        try:
            read()
        except UserError:
            continue


def _metrics(folder: Path) -> Sequence[bytes]:
    rows = [{"step": step, "loss": 1 / (1 + step), "val/accuracy": 0.5, "lr": 1e-3} for step in range(0, 50, 10)]
    return ["".join(json.dumps(row) + "\n" for row in rows).encode()]


def _measured(folder: Path, data: bytes) -> None:
    (folder / "metrics.jsonl").write_bytes(data)
    list(origin._metrics(folder, 30))
    log._forget_after(folder / "metrics.jsonl", 30)


def _states_of_runs(folder: Path) -> Sequence[bytes]:
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2)
    checkpoint.save(folder, 10, {"model": model.state_dict(), "optimizer": {"a": torch.ones(1)}}, {}, 1)
    return [(folder / "step-00000010/state.json").read_bytes()]


def _checkpoint(folder: Path, data: bytes) -> None:
    place = folder / "step-00000010"
    if not place.exists():
        _states_of_runs(folder)
    (place / "state.json").write_bytes(data)
    checkpoint.load(place)


# Servers


ANSWER = b'HTTP/1.1 200 OK\r\nContent-Length: 300\r\nETag: "a"\r\nContent-Type: x/y\r\n\r\n' + bytes(range(100)) * 3
ANSWERS = (
    ANSWER,
    ANSWER.replace(b"Content-Length: 300", b"Content-Encoding: gzip"),
    b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-299/300\r\nContent-Length: 300\r\n\r\n" + bytes(300),
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n64\r\n"
    + bytes(100)
    + b"\r\nc8\r\n"
    + bytes(200)
    + b"\r\n0\r\n\r\n",
    b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 5\r\n\r\nsorry",
)
PATIENCE = Retry(attempts=2, wait=0, longest=0, timeout=0.2)


def _answered(folder: Path, data: bytes) -> None:
    """A shard of 300 bytes from a server that gives these bytes to whoever asks."""
    with socket.create_server(("127.0.0.1", 0)) as server, open(folder / "x", "w+b") as file:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.settimeout(1)
                    try:
                        connection.recv(2**16)
                        connection.sendall(data)
                    except OSError:
                        continue

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            fetch(f"http://127.0.0.1:{server.getsockname()[1]}/x.tar", file, 300, PATIENCE)
            assert (folder / "x").stat().st_size == 300
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(5)


ZIPPED = partial(ways.zip_member, ways=INSIDE)
TARRED = partial(ways.tar_member, ways=INSIDE)
JSON = (ways.json_text, ways.json_text, *ways.BLIND)
READERS: dict[str, Reader] = {
    "npz": Reader(_npz, (ZIPPED, ZIPPED, *ways.BLIND), _weights),
    "torch zip": Reader(partial(_torch, new=True), (ZIPPED, ZIPPED, *ways.BLIND), _weights),
    "torch legacy": Reader(partial(_torch, new=False), (ways.pickled, ways.pickled, *ways.BLIND), _weights),
    "safetensors": Reader(_safetensors, (ways.safetensors, ways.safetensors, *ways.BLIND), _weights),
    "json beside weights": Reader(_config, (_beside,), _folder),
    **{kind: _of_images(kind) for kind in ("jpeg", "png", "webp", "tiff", "other images")},
    "tar": Reader(_tars, (TARRED, TARRED, *ways.BLIND), _indexed),
    "index": Reader(_indexes, (ways.safetensors, *ways.BLIND), _of_index),
    "archive": Reader(_archives, (_archive, _archive, *ways.BLIND), _source),
    "make.json": Reader(_makings, JSON, _made, share=2),
    "recipe": Reader(_recipes, (ways.yaml_text, ways.yaml_text, *ways.BLIND), _recipe),
    "settled, machine, results": Reader(_settled, JSON, _json_beside, share=4),
    "metrics": Reader(_metrics, (ways.json_lines, *ways.BLIND), _measured, share=4),
    "checkpoint": Reader(_states_of_runs, JSON, _checkpoint, share=4),
    "server": Reader(lambda folder: ANSWERS, (ways.digits, *ways.BLIND), _answered),
}  # fmt: skip
