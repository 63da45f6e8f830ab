"""Tiny recipes and objectives, ways to run them, and a small disk, that the tests of runs share."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import picture_folder, tiny_config
from torch import Tensor, nn

from mpp.batch import Batch
from mpp.cli import main
from mpp.loop import train
from mpp.models.vit import ViT
from mpp.objectives.base import Objective
from mpp.objectives.masked_patch import MaskedPatchPrediction
from mpp.shards.write import make_shards
from mpp.train_config import LogConfig, TrainConfig

RECIPE = """\
seed: 3
model: {image: 16, patch: 4, width: 32, depth: 1, heads: 2}
objective: {name: mpp}
data: {path: PATH, augment: {crop: shift, pad: 2}}
train: {steps: 6, warmup: 2, batch: 8, micro_batch: 4, lr: 1e-3, precision: float32, device: cpu, save_every: 2}
log: {every: 1, pictures: 0}
"""
LABELS = """\
seed: 3
model: {image: 16, patch: 4, width: 32, depth: 2, heads: 2, pool: avg}
objective: {name: labels}
data: {path: PATH, val: test, augment: {crop: shift, pad: 2}}
train: {steps: 6, warmup: 2, batch: 8, micro_batch: 4, lr: 1e-2, precision: float32, device: cpu}
eval: {every: 2}
log: {every: 1, pictures: 0, tensorboard: false}
"""
RESNET = LABELS.replace(
    "patch: 4, width: 32, depth: 2, heads: 2, pool: avg", "name: resnet, depth: 18, width: 4, stem: small"
)
FEW = TrainConfig(
    steps=6, warmup=2, batch=20, micro_batch=10, lr=1e-3, precision="float32", device="cpu", save_every=3, keep=9
)


BAR = re.compile(r"step/s|[0-9]s/step|\?step")  # of a progress bar, on a slow machine too


class Finished(NamedTuple):
    """What a command said, and its exit status."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The error: the one line that begins with "mpp: ", and all there is but for a progress bar."""
        lines = [line for line in self.err.replace("\r", "\n").splitlines() if line.strip() and not BAR.search(line)]
        assert [line[:5] for line in lines] == ["mpp: "], self.err
        return lines[0]


class Brightness(Objective):
    """Predicts an image's mean colour. It draws a number, for tests to look at, that plays no part in the loss."""

    def __init__(self, encoder: ViT) -> None:
        super().__init__(encoder)
        self.head = nn.Linear(encoder.config.width, 3)
        self.drawn: list[float] = []

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        self.drawn.append(torch.rand(()).item())
        truth = batch.images.float().mean((2, 3)) / 255
        error = F.mse_loss(self.head(self.encoder(batch.images)).float(), truth)
        return error, {"red": truth[:, 0].mean()}


class PowerCut(Exception):
    pass


class Cut:
    """Batches that end with a power cut: what was not saved before is lost."""

    def __init__(self, batches, after: int) -> None:
        self.batches, self.after = batches, after

    def at(self, step):
        return self.batches.at(step)

    def iterate(self, start, stop=()):
        for step in range(start, self.after):
            yield self.batches.at(step)
        raise PowerCut


def masked(**changes) -> MaskedPatchPrediction:
    torch.manual_seed(7)
    return MaskedPatchPrediction(ViT(tiny_config(image=(16, 16), patch=4, width=32, depth=1, **changes)))


def write_recipe(folder: Path, shards: Path, text: str = RECIPE) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(text.replace("PATH", str(shards)))
    return path


def run(*arguments: object) -> Finished:
    """A command in this process, which saves the seconds that a new one takes to start. A traceback fails the test."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Finished(code, out.getvalue(), err.getvalue())


def start(*arguments: object) -> subprocess.Popen:
    """A command in a process of its own."""
    command = [sys.executable, "-m", "mpp", *map(str, arguments)]
    pipe, env = subprocess.PIPE, {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env)


def finished(process: subprocess.Popen) -> Finished:
    out, err = process.communicate(timeout=120)
    return Finished(process.returncode, out, err)


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def fit(out: Path, images, config: TrainConfig = FEW, **options) -> MaskedPatchPrediction:
    """Trains a tiny objective, which is always the same at its start."""
    objective = masked()
    train(objective, images, config, out=out, log=LogConfig(every=1, pictures=0, tensorboard=False), **options)
    return objective


def losses(out: Path) -> dict[int, float]:
    lines = [line for line in metrics(out) if "loss" in line]
    found = {line["step"]: line["loss"] for line in lines}
    assert len(found) == len(lines), "each step is logged once"
    return found


def digests(out: Path, step: int) -> dict[str, str]:
    """What a checkpoint says its files hold: equal if weights, optimizer and average are equal bit for bit."""
    return json.loads((out / f"checkpoints/step-{step:08d}/state.json").read_text())["sha256"]


def small_splits(root: Path, classes: int = 2) -> Path:
    """Shards of 40 images to train on and 20 to test on, 16x16."""
    for split, count in {"train": 40, "test": 20}.items():
        picture_folder(root / "source" / split, count, classes=classes)
    make_shards(root / "source", root / "shards", per_shard=25, report=lambda line: None, progress=False)
    return root / "shards"


@contextlib.contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[Path]:
    """A disk of that size, mounted on a new folder; skips the test where that is not allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command on this machine")
    if mounted.returncode:
        pytest.skip(f"mounting a small disk is not allowed here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
