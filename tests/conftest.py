"""Small encoders, batches and shards that many tests share."""

import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mpp.batch import Batch
from mpp.eval import PROTOCOLS
from mpp.execution import WORKSPACE
from mpp.models.vit import ViT
from mpp.models.vit_config import ViTConfig
from mpp.objectives import OBJECTIVES
from mpp.shards.write import make_shards

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # so begins a job in the background, and its children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # the models here are so small that threads would only wait for each other


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def inside_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes an empty folder the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a test set the variable that cuBLAS reads, and takes it away again."""
    monkeypatch.setenv(WORKSPACE, "")
    monkeypatch.delenv(WORKSPACE)


@pytest.fixture
def own_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a test add parts to the tables that hold mpp's own alone, and takes them out again."""
    for table in (OBJECTIVES, PROTOCOLS):
        monkeypatch.setattr(table, "_added", {})


def tiny_config(**changes) -> ViTConfig:
    """A 4x6 grid of patches of 8 pixels: neither square nor as wide as it is deep."""
    return ViTConfig(**{"image": (32, 48), "patch": 8, "width": 64, "depth": 2, "heads": 2} | changes)


def shaken(encoder: ViT) -> ViT:
    """An encoder none of whose parameters is zero or alike, so that each matters to the output."""
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder


@pytest.fixture
def tiny_vit() -> ViT:
    return shaken(ViT(tiny_config()))


@pytest.fixture
def batch() -> Batch:
    return Batch(torch.randint(0, 256, (4, 3, 32, 48), dtype=torch.uint8))


def pictures(count: int, size: tuple[int, int] = (16, 16), seed: int = 0) -> list[np.ndarray]:
    """Smooth colour pictures, all different: a coarse random picture enlarged."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (count, 3, 3, 3), dtype=np.uint8)
    return [np.asarray(Image.fromarray(picture).resize(size[::-1], Image.Resampling.BICUBIC)) for picture in coarse]


def picture_folder(folder: Path, count: int, size: tuple[int, int] = (16, 16), classes: int = 2) -> Path:
    """A folder CLASS/NUMBER.jpg of smooth pictures."""
    for number, picture in enumerate(pictures(count, size)):
        place = folder / f"class{number % classes}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(place / f"{number:04d}.jpg", quality=95)
    return folder


@pytest.fixture(scope="session")
def small_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split `train` of 53 images of 16x16 in three shards."""
    root = tmp_path_factory.mktemp("small")
    source = picture_folder(root / "source", 53)
    make_shards(source, root / "shards", per_shard=20, report=lambda line: None, progress=False)
    return root / "shards"
