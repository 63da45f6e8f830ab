"""Training gives the losses that tests/losses.json holds, and tests/same_losses.py sees a last bit.

When they were recorded they were those of commit a576596, bit for bit. A change that is meant to alter them
records them anew: `python tests/same_losses.py --record tests/losses.json`.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import same_losses
import torch
from safetensors.torch import save_file

RECORDED = json.loads((Path(__file__).parent / "losses.json").read_text())
RELATIVE = 1e-4  # other processors and versions of torch sum in another order


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What this tree computes here; one process for all cases, which takes seconds to start."""
    file = tmp_path_factory.mktemp("losses") / "losses.json"
    command = [sys.executable, same_losses.__file__, "--record", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env={**os.environ})
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(file.read_text())


@pytest.mark.skipif(
    same_losses.draws() != RECORDED["draws"],
    reason=f"torch {torch.__version__} draws other random numbers than {RECORDED['torch']}, by which this was recorded",
)
@pytest.mark.parametrize("case", RECORDED["losses"])
def test_the_losses_are_the_recorded_ones(computed, case):
    np.testing.assert_allclose(computed["losses"][case], RECORDED["losses"][case], rtol=RELATIVE)


def test_every_case_is_recorded():
    assert list(RECORDED["losses"]) == [case.name for case in same_losses.CASES if not case.killed]
    assert {len(losses) for losses in RECORDED["losses"].values()} == {same_losses.STEPS}


def run_folder(folder: Path, losses: list[float], **tensors: torch.Tensor) -> Path:
    folder.mkdir()
    lines = [{"step": step, "loss": loss, "images/s": id(folder)} for step, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_file({"weight": torch.ones(2), **tensors}, folder / "encoder.safetensors")
    return folder


def test_equal_runs_are_equal_however_fast_they_were(tmp_path):
    there, here = (run_folder(tmp_path / name, [0.7, 0.1]) for name in ("there", "here"))
    assert same_losses.differ(there, here) is None


def test_one_bit_of_one_loss_is_a_difference(tmp_path):
    there = run_folder(tmp_path / "there", [0.7, 0.1, 0.3])
    here = run_folder(tmp_path / "here", [0.7, math.nextafter(0.1, 1), 0.3])
    assert same_losses.differ(there, here) == "step 2: loss 0.1 there, 0.10000000000000002 here"


def test_a_lacking_step_is_a_difference(tmp_path):
    there, here = run_folder(tmp_path / "there", [0.7, 0.1]), run_folder(tmp_path / "here", [0.7])
    assert same_losses.differ(there, here) == "step 2: only there"


def test_one_bit_of_one_weight_is_a_difference(tmp_path):
    changed = torch.ones(2)
    changed[1] = torch.nextafter(changed[1], torch.tensor(2.0))
    there, here = run_folder(tmp_path / "there", [0.7]), run_folder(tmp_path / "here", [0.7], weight=changed)
    found = same_losses.differ(there, here)
    assert found
    assert found.startswith("encoder.safetensors: weight: F32 [2] ")


def test_a_weight_more_is_a_difference(tmp_path):
    there, here = run_folder(tmp_path / "there", [0.7]), run_folder(tmp_path / "here", [0.7], bias=torch.ones(1))
    assert same_losses.differ(there, here).startswith("encoder.safetensors: bias: None there, F32 [1] ")


def test_not_a_number_equals_itself_and_a_lacking_figure_nothing():
    assert same_losses.metrics_differ({1: {"loss": math.nan}}, {1: {"loss": math.nan}}) is None
    assert same_losses.metrics_differ({1: {"loss": 1.0}}, {1: {}}) == "step 1: loss 1.0 there, None here"
