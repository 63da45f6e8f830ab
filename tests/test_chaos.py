"""A small `python tests/chaos.py`: two processes, and two of its faults; and what it would find."""

import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from chaos import KINDS, MARK, Training, disturbed, drawn, judged, served, written_recipe
from conftest import picture_folder
from http_server import serving
from safetensors.torch import load_file, save_file

from mpp.recipe import load_recipe
from mpp.run import run
from mpp.shards.write import make_shards

SPACING = 12
STEPS = 3 * SPACING
KINDS_TRIED = ["server fails", "bit flipped"]
# One process and two add the same numbers in another order, which training makes larger in so many steps.
TOLERANCES = {"losses": 1e-5, "figures": 1e-3, "weights": 1e-4}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """It, and the URL of the shards that it serves."""
    root = tmp_path_factory.mktemp("pictures")
    images = {"train": 1000, "test": 96}
    for split, count in images.items():
        picture_folder(root / "source" / split, count, (32, 32))
    make_shards(root / "source", root / "shards", report=lambda line: None, progress=False)
    with serving() as server:
        yield server, served(server, root / "shards", images)


@pytest.fixture(scope="module")
def undisturbed(server, tmp_path_factory) -> Path:
    """A run by one process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return run(load_recipe(written_recipe(folder, "alone", server[1], STEPS), [f"out={folder / 'run'}"]))


def training_in(folder: Path, server) -> Training:
    recipe = written_recipe(folder, "disturbed", server[1], STEPS, gib=0.0028)  # four of the five shards
    return Training(recipe, folder / "run", server[0], 2, random.Random(0))


def test_two_processes_with_faults_end_as_one_without(server, undisturbed, tmp_path):
    training = training_in(tmp_path, server)
    try:
        met = disturbed(training, KINDS_TRIED, SPACING)
        facts, wrong = judged(training, undisturbed, STEPS, KINDS_TRIED, TOLERANCES)
    finally:
        training.end()
    assert not wrong, facts
    assert [one.kind for one in met] == KINDS_TRIED
    assert facts["attempts"] == 2, "one of the faults ended the processes, and torchrun started them again"


def test_what_is_not_as_undisturbed_is_found(server, undisturbed, tmp_path):
    training = training_in(tmp_path, server)
    shutil.copytree(undisturbed, training.out)
    assert judged(training, undisturbed, STEPS, [])[1] == []
    assert judged(training, undisturbed, STEPS, ["checkpoint cut"])[1] == ["0 of 1 damaged checkpoints were noticed"]

    metrics = training.out / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    changed = [json.dumps(row | {"loss": row["loss"] + 1e-5}) if "loss" in row else lines[at] for at, row in
               enumerate(map(json.loads, lines))]  # fmt: skip
    metrics.write_text("\n".join(changed) + "\n")
    found = judged(training, undisturbed, STEPS, [])[1]
    assert [line.split(" by ")[0] for line in found] == ["losses differ", "figures differ"]
    metrics.write_text("\n".join([*lines[:3], lines[2], *lines[3:]]) + "\n")
    assert "steps are not logged once each" in judged(training, undisturbed, STEPS, [])[1][0]
    metrics.write_text("\n".join(lines) + "\n")

    weights = load_file(training.out / "encoder.safetensors")
    save_file({name: tensor + 1e-5 for name, tensor in weights.items()}, training.out / "encoder.safetensors")
    assert "weights differ by" in judged(training, undisturbed, STEPS, [])[1][0]
    shutil.copy(undisturbed / "encoder.safetensors", training.out)

    (training.out / "checkpoints/.partial-00000005").mkdir()
    (training.logs / "0").mkdir(parents=True)
    (training.logs / "0/stderr.log").write_text("Traceback (most recent call last):\n")
    left = subprocess.Popen(["sleep", "60"], env={**os.environ, MARK: training.mark})
    found = "\n".join(judged(training, undisturbed, STEPS, [])[1])
    training.end()
    left.wait()
    assert f"process {left.pid} is left" in found
    assert ".partial-00000005 is left" in found
    assert "mpp said: Traceback" in found


def test_each_kind_of_fault_comes_before_any_comes_again():
    kinds = drawn(2 * len(KINDS) - 3, random.Random(5))
    assert set(kinds[: len(KINDS)]) == set(KINDS)
    assert len(set(kinds[len(KINDS) :])) == len(KINDS) - 3
    assert kinds != drawn(len(kinds), random.Random(6))
