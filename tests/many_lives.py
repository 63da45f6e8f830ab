"""Trains in child processes that are killed with -9 at random moments: RECIPE FOLDER SEED.

FOLDER/run0 is never killed. Then runs are started and killed, and started again in their folder until they end, until
twenty have been killed. A fork has torch imported already, so that lives are short and the kills land all over.
"""

import json
import os
import random
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

import torch
from tqdm import tqdm

from mpp.recipe import load_recipe
from mpp.run import run as carry_out

STEPS, KILLS = 300, 20


def born(recipe: str, out: Path) -> int:
    """A child that trains; its process id."""
    settings = [f"train.steps={STEPS}", "train.save_every=3", "train.ema=0.9", "log.tensorboard=false"]
    child = os.fork()
    if child == 0:
        status = 1
        tqdm.set_lock(threading.RLock())  # the usual lock is shared by forks: one killed with it would stop all others
        try:
            carry_out(load_recipe(recipe, [*settings, f"out={out}"]))
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    return child


def lived(child: int) -> bool:
    """Whether a child came to its end by itself."""
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"status {status}"
    return os.WIFEXITED(status)


def reached(out: Path) -> int:
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return sum(1 for line in lines if line.endswith("}") and "loss" in json.loads(line))


def main(recipe: str, folder: Path, seed: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of forks of a process with threads: here all have ended
    tqdm.monitor_interval = 0  # no thread that outlives a run
    carry_out(load_recipe(recipe, ["train.steps=2", f"out={folder / 'warm'}"]))  # imports all there is to import
    started = time.monotonic()
    assert lived(born(recipe, folder / "run0"))
    alone = time.monotonic() - started
    print(f"never killed: {alone:.1f} s")
    draws, kills, run = random.Random(seed), 0, 1
    while kills < KILLS:
        out = folder / f"run{run}"
        child = born(recipe, out)
        time.sleep(draws.uniform(0, 2.2 * alone / KILLS))
        os.kill(child, signal.SIGKILL)
        if lived(child):
            run += 1
        else:
            kills += 1
            print(f"killed after step {reached(out)}, run {run}")
    assert lived(born(recipe, folder / f"run{run}"))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
