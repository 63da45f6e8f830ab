from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import picture_folder, shaken, tiny_config
from PIL import Image
from shard_files import write_files

import mpp.eval.labelled.images
from mpp.errors import UserError
from mpp.eval.labelled.embed import embed
from mpp.models.cnn import ResNet
from mpp.models.resnet_config import ResNetConfig
from mpp.models.vit import ViT
from mpp.shards.index import read_index
from mpp.shards.write import make_shards
from mpp.weights import save_encoder

COUNT = 12


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpp.hardware.multiplies_bfloat16", lambda device: False)
    monkeypatch.setattr(mpp.eval.labelled.images, "BATCH", 5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return picture_folder(tmp_path / "photos", COUNT, (16, 24), classes=3)


@pytest.fixture(params=["vit", "resnet"])
def encoder(request: pytest.FixtureRequest, tmp_path: Path) -> torch.nn.Module:
    resnet = ResNetConfig(image=(16, 24), depth=18, width=4, stem="small")
    encoder = shaken(ViT(tiny_config(image=(16, 24))) if request.param == "vit" else ResNet(resnet)).eval()
    save_encoder(encoder, tmp_path / "encoder.safetensors")
    return encoder


def read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:  # without pickle
        return {name: file[name] for name in file.files}


@torch.no_grad()
def slow(encoder: torch.nn.Module, path: Path) -> np.ndarray:
    pixels = torch.tensor(np.asarray(Image.open(path))).permute(2, 0, 1).unsqueeze(0)
    return encoder(pixels)[0].numpy()


def test_vectors_of_a_folder_are_the_encoders(encoder, folder, tmp_path):
    lines: list[str] = []
    embed(tmp_path / "encoder.safetensors", folder, tmp_path / "out.npz", report=lines.append)
    found = read(tmp_path / "out.npz")
    assert (found["features"].dtype, found["features"].shape) == (np.float32, (COUNT, encoder.width))
    assert found["keys"].tolist() == sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.jpg"))
    for key, vector, label in zip(found["keys"], found["features"], found["labels"], strict=True):
        np.testing.assert_allclose(vector, slow(encoder, folder / key), rtol=1e-4, atol=1e-5)
        assert found["classes"][label] == key.split("/")[0]
    assert lines == [f"{tmp_path / 'out.npz'}: {COUNT} vectors of {encoder.width} numbers"]


def test_vectors_of_shards_are_those_of_the_folder(encoder, folder, tmp_path):
    make_shards(folder, tmp_path / "shards", report=lambda line: None, progress=False)
    for data, name in ((folder, "a.npz"), (tmp_path / "shards", "b.npz")):
        embed(tmp_path / "encoder.safetensors", data, tmp_path / name, report=lambda line: None)
    a, b = read(tmp_path / "a.npz"), read(tmp_path / "b.npz")
    index = read_index(tmp_path / "shards", "train")
    assert b["keys"].tolist() == [index.key(i) for i in range(COUNT)]
    assert b["labels"].tolist() == index.label.tolist()
    assert b["labels"].dtype == np.int64
    order_a, order_b = (np.lexsort(found["features"].round(4).T) for found in (a, b))
    np.testing.assert_allclose(a["features"][order_a], b["features"][order_b], rtol=1e-4, atol=1e-5)
    assert a["labels"][order_a].tolist() == b["labels"][order_b].tolist()


def test_without_labels_there_are_none(tmp_path):
    save_encoder(ViT(tiny_config()), tmp_path / "encoder.safetensors")
    picture_folder(tmp_path / "photos", 3, classes=1)
    embed(tmp_path / "encoder.safetensors", tmp_path / "photos", tmp_path / "out.npz", report=lambda line: None)
    assert read(tmp_path / "out.npz").keys() == {"features", "keys"}  # one folder around everything is no class


def test_damaged_images_are_named_and_left_out(folder, tmp_path, caplog):
    save_encoder(ViT(tiny_config()), tmp_path / "encoder.safetensors")
    write_files(folder, {"class1/aaa.jpg": b"none"})
    embed(tmp_path / "encoder.safetensors", folder, tmp_path / "out.npz", report=lambda line: None)
    assert len(read(tmp_path / "out.npz")["keys"]) == COUNT
    assert "class1/aaa.jpg is damaged and passed over" in caplog.text


def test_nothing_is_written_where_nothing_can_be(folder, tmp_path):
    save_encoder(ViT(tiny_config()), tmp_path / "encoder.safetensors")
    for data, out, words in (
        (folder, tmp_path / "none/out.npz", "its folder does not exist"),
        (folder, tmp_path / "out.txt", "expected a name that ends in .npz"),
        (tmp_path / "none", tmp_path / "out.npz", "no such folder"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            embed(tmp_path / "encoder.safetensors", data, out, report=lambda line: None)
        assert "\n" not in str(caught.value)
        assert not out.exists()
