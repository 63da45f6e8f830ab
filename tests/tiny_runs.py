"""A tiny recipe, ways to run it, and a small disk, that the tests of runs share."""

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import picture_folder

from mpp.cli import main
from mpp.data.write import make_shards

RECIPE = """\
seed: 3
model: {image: 16, patch: 4, width: 32, depth: 1, heads: 2}
objective: {name: mpp}
data: {path: PATH, augment: {crop: shift, pad: 2}}
train: {steps: 6, warmup: 2, batch: 8, micro_batch: 4, lr: 1e-3, precision: float32, device: cpu, save_every: 2}
log: {every: 1, pictures: 0}
"""


class Finished(NamedTuple):
    """What a command said, and its exit status."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The error: the one line that begins with "mpp: ", and all there is but for a progress bar."""
        lines = [line for line in self.err.replace("\r", "\n").splitlines() if line.strip() and "step/s" not in line]
        lines = [line for line in lines if "?step" not in line]
        assert [line[:5] for line in lines] == ["mpp: "], self.err
        return lines[0]


def write_recipe(folder: Path, shards: Path) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.replace("PATH", str(shards)))
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
