"""docs/scaling.md as printed: torchrun and mpp read its commands, its sbatch file runs with stand-ins for SLURM."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import RECIPE, losses, metrics, write_recipe
from torch.distributed.run import parse_args

import mpp
from mpp import checkpoint
from mpp.cli.commands import recipe_of
from mpp.cli.parser import parsed
from mpp.errors import counted
from mpp.recipe import load_recipe
from mpp.workers import cores

DOC = Path(__file__).parents[1] / "docs/scaling.md"
BLOCKS = re.findall(r"^```\w*\n(.*?)^```$", DOC.read_text(), re.MULTILINE | re.DOTALL)
(SCRIPT,) = (block for block in BLOCKS if block.startswith("#!/bin/bash"))
LINES = [
    line.removeprefix("$ ") for block in BLOCKS if block != SCRIPT for line in block.replace("\\\n", "").splitlines()
]
STEPS = 80
STAND_INS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done\nexec "$@"',  # so that a signal to srun is one to torchrun
    "scontrol": 'case $1 in show) echo localhost;; requeue) echo "$2" >> "$REQUEUED";; esac',
}


def command(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


def free_job() -> int:
    """The number of a job whose port, as the script makes it, is free."""
    for number in range(os.getpid() % 5000, 10_000):
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", 20000 + number)):
                return number
    raise AssertionError("no port is free")


class Slurm:
    """A cluster of one node, this machine, as far as the script can tell."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.job = folder, free_job()
        (folder / "bin").mkdir()
        (folder / "train.sbatch").write_text(SCRIPT)
        for name, text in STAND_INS.items():
            command(folder / "bin", name, text)

    def sbatch(self, *arguments: object) -> subprocess.Popen:
        here, found = [str(self.folder / "bin"), str(Path(sys.executable).parent)], os.environ["PATH"]
        env = os.environ | {
            "PATH": os.pathsep.join([*here, found]),
            "PYTHONPATH": str(Path(mpp.__file__).parents[1]),
            "REQUEUED": str(self.folder / "requeued"),
            "READY": str(self.folder / "ready"),
            "SLURM_JOB_ID": str(self.job),
            "SLURM_JOB_NODELIST": "node[0-0]",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_CPUS_PER_TASK": str(cores()),
            "PROCESSES": "2",
        }
        words = ["bash", str(self.folder / "train.sbatch"), *map(str, arguments)]
        return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    @property
    def requeued(self) -> list[str]:
        path = self.folder / "requeued"
        return path.read_text().split() if path.exists() else []


@pytest.fixture
def slurm(tmp_path):
    return Slurm(tmp_path)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    until = time.monotonic() + 120
    while not (path.exists() and path.read_bytes().endswith(b"\n")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.slow
def test_a_job_whose_time_is_up_saves_is_requeued_and_goes_on_and_a_finished_one_is_not_requeued(
    slurm, small_shards, tmp_path
):
    recipe, out = write_recipe(tmp_path, small_shards, RECIPE), tmp_path / "run"
    arguments = recipe, f"out={out}", f"train.steps={STEPS}", "train.save_every=1000", "log.tensorboard=false"
    job = slurm.sbatch(*arguments)
    wait_for(out / "metrics.jsonl", job)
    job.send_signal(signal.SIGUSR1)
    said = job.communicate(timeout=120)[0]
    assert job.returncode != 0
    stopped = int(re.findall(r"mpp: stopped by SIGUSR1 after step (\d+); run the same command", said)[0])
    assert checkpoint.steps(out / "checkpoints")[-1] == stopped < STEPS
    share = counted(max(1, cores() // 2), "thread")
    assert said.count("processes, each with") == said.count(f"mpp: 2 processes, each with {share}, on cpu (gloo)") == 1
    assert slurm.requeued == [str(slurm.job)]

    again = slurm.sbatch(*arguments)
    said = again.communicate(timeout=120)[0]
    assert again.returncode == 0, said
    assert list(losses(out)) == list(range(1, STEPS + 1)), "each step was taken once"
    assert {line["step"] for line in metrics(out)} == set(losses(out))
    assert (out / "encoder.safetensors").exists()
    assert slurm.requeued == [str(slurm.job)], "only the first time"


@pytest.mark.parametrize(
    ("ends", "number", "status"),
    [
        ('trap "exit 0" USR1', signal.SIGUSR1, 0),  # it was at its end
        ('trap "sleep 0.3; exit 1" TERM', signal.SIGTERM, 1),  # scancel: the script waits for it
        ("exit 3", None, 3),  # it failed
    ],
)
def test_only_what_was_stopped_before_its_end_is_requeued(ends, number, status, slurm):
    work = 'echo >"$READY"; while :; do sleep 0.02; done'
    command(slurm.folder / "bin", "torchrun", f"{ends}\n{work}")
    job = slurm.sbatch("recipe.yaml")
    if number is not None:
        wait_for(slurm.folder / "ready", job)
        job.send_signal(number)
        if number == signal.SIGTERM:
            os.kill(child(job.pid), number)  # as SLURM does
    said = job.communicate(timeout=60)[0]
    assert job.returncode == status, said
    assert slurm.requeued == []


def child(parent: int) -> int:
    """The process that the script started, and waits for."""
    found = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    assert len(found) == 1
    return int(found[0])


def test_torchrun_and_mpp_take_the_commands_of_the_page():
    found = 0
    for line in LINES:
        words = shlex.split(line, comments=True)
        if words[:1] == ["torchrun"]:
            launch = parse_args(words[1:])
            assert launch.no_python
            words = [launch.training_script, *launch.training_script_args]
        if words[:1] == ["mpp"]:
            options = parsed(words[1:])
            assert (
                recipe_of(options) if "weights" in options else load_recipe(options.recipe, options.overrides)
            ).train
            found += 1
    assert found == sum("mpp p" in line or "mpp f" in line for line in LINES) >= 6
