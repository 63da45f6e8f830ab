"""A contender of `python -m benchmarks.against`: runs the `mpp` that PYTHONPATH holds, a round for each line it reads.

    PYTHONPATH=TREE python benchmarks/against_worker.py JSON

It works with the code of other commits too, so it uses nothing but stable names of mpp, and no other file of this
folder. It answers with lines of JSON: one when it is prepared, which says where its mpp lies, and one a round.
"""

import contextlib
import io
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import mpp

Round = Callable[[], tuple[int, float, float]]  # images, seconds, and seconds of this process's CPU time
RECIPE = """\
model: {image: IMAGE, patch: 4, width: 192, depth: 12, heads: 3}
objective: {name: mpp}
data: {path: unused}
train: {steps: STEPS, batch: BATCH, lr: 2e-4, device: cpu, threads: THREADS}
log: {every: STEPS, pictures: 0, tensorboard: false}
"""


class SameBatch:
    """One batch in memory where `mpp.train` expects a reader. Step k is over at times[k]."""

    def __init__(self, batch: mpp.Batch) -> None:
        self.batch = batch
        self.times: list[tuple[float, float]] = []  # on the clock, and of CPU time

    def at(self, step: int) -> mpp.Batch:
        return self.batch

    def iterate(self, start: int = 0, stop: Sequence[int] = ()) -> Iterator[mpp.Batch]:
        while True:
            self.times.append(now())
            yield self.batch


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def training(image: int, batch: int, threads: int, steps: int, warm_up: int) -> Round:
    """`mpp.train` by default settings for some steps; what it does before and after them is off the clock."""
    from mpp.objectives.masked_patch import MaskedPatchPrediction

    torch.set_num_threads(threads)
    # One step more than is timed: its last one is followed by a log and a checkpoint.
    settings = {"IMAGE": image, "BATCH": batch, "THREADS": threads, "STEPS": warm_up + steps + 1}
    with tempfile.TemporaryDirectory() as folder:
        path, text = Path(folder) / "step.yaml", RECIPE
        for name, value in settings.items():
            text = text.replace(name, str(value))
        path.write_text(text)
        recipe = mpp.load_recipe(path)
    objective = MaskedPatchPrediction(mpp.ViT(recipe.model))
    coarse = torch.rand(batch, 3, 8, 8)
    smooth = torch.nn.functional.interpolate(coarse, size=(image, image), mode="bilinear")
    images = (255 * smooth).round().to(torch.uint8)

    def run() -> tuple[int, float, float]:
        source = SameBatch(mpp.Batch(images))
        with tempfile.TemporaryDirectory() as out, contextlib.redirect_stderr(io.StringIO()):  # the progress bar
            mpp.train(objective, source, recipe.train, out=Path(out), log=recipe.log)
        (start, busy), (end, busy_then) = source.times[warm_up], source.times[warm_up + steps]
        return steps * batch, end - start, busy_then - busy

    return run


def reading(folder: str, batch: int, image: int, reader: str, seconds: float, warm_up: int) -> Round:
    """Batches of a training split that has been met before, from a new iterator each round."""
    torch.set_num_threads(1)
    batches = mpp.read_shards(folder, batch, image=(image, image), reader=reader, threads=1)
    for step in range(len(batches)):
        batches.at(step)  # meets each image for the first time, and "resident" decodes it for the last
    starts = itertools.count(1000, 1000)

    def run() -> tuple[int, float, float]:
        images, iterator = 0, batches.iterate(next(starts))
        for _ in range(warm_up):
            next(iterator)
        start, busy = now()
        while time.perf_counter() - start < seconds:
            images += len(next(iterator))
        end, busy_then = now()
        return images, end - start, busy_then - busy

    return run


def answer(**facts: Any) -> None:
    print(json.dumps(facts), file=ANSWERS, flush=True)


if __name__ == "__main__":
    ANSWERS = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed goes beside the answers
    kind, cores, arguments = json.loads(sys.argv[1])
    if cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])
    torch.manual_seed(0)
    one_round = {"training": training, "reading": reading}[kind](**arguments)
    answer(home=str(Path(mpp.__file__).resolve().parent.parent))
    for _ in sys.stdin:
        started = time.process_time()
        images, seconds, busy = one_round()
        peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**10
        answer(images=images, seconds=seconds, busy=busy, busy_in_all=time.process_time() - started, peak_mib=peak)
