"""What a checkpoint costs training: written in the background, before the next step, and none at all.

    python -m benchmarks.saving [--rounds 9] [--threads 1] [--device cpu] [--folder DISK]

A round is a warm-up step, then a checkpoint of ViT-S/16 (weights, Adam's averages, a running average) and STEPS steps.
`held` is how long training stood still for the checkpoint, `longest` the longest step after it. The next checkpoint
would wait for this one: what of that is left when the steps are done is not on the clock, but told (`left`).
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import Contender, Timing
from benchmarks.step import LEARNING_RATE, SIZES, SameBatch, Size, images_of, our_objective, settle

NONE, BEFORE, BACKGROUND = "no checkpoint", "written before the next step", "written in the background"
STEPS = {"cpu": 6, "cuda": 40}
BATCH = {"cpu": 4, "cuda": 256}  # images


def prepare(name: str, size: Size, device: str, threads: int, folder: Path) -> Callable[[], Timing]:
    import torch

    from mpp import checkpoint
    from mpp.average import average, averaged
    from mpp.batch import Batch
    from mpp.execution import choose, forward_pass
    from mpp.loop import build_optimizer, snapshot, update
    from mpp.saving import Writer
    from mpp.train_config import TrainConfig

    settle(threads)
    batch = Batch(images_of(size, device))
    objective = our_objective(size).to(device).train()
    config = TrainConfig(steps=10_000, batch=size.batch, micro_batch=size.batch, lr=LEARNING_RATE, device=device)
    execution = choose(objective, SameBatch(batch), config)
    optimizer, forward = build_optimizer(objective, config), forward_pass(objective, config, execution)
    ema = [value.clone() for value in averaged(objective).values()]
    numbers, rounds = itertools.count(1), itertools.count(1)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def step() -> float:
        start = time.perf_counter()
        update(forward, objective, optimizer, batch, config, size.batch, 0, next(numbers))
        average(ema, objective, 0.999)
        wait()
        return time.perf_counter() - start

    def in_turn() -> Timing:
        step()
        with Writer(folder / name.replace(" ", "-"), {}, keep=1) as writer:
            start = time.perf_counter()
            if name == BACKGROUND:
                writer.write(next(rounds), snapshot(objective, optimizer, ema))
            elif name == BEFORE:
                state = {"model": objective.state_dict(), "optimizer": checkpoint.optimizer_state(objective, optimizer)}
                state["ema"] = state["model"] | dict(zip(averaged(objective), ema, strict=True))
                checkpoint.save(folder / name.replace(" ", "-"), next(rounds), state, {}, keep=1)
            held = time.perf_counter() - start
            longest = max(step() for _ in range(STEPS[device]))
            trained = time.perf_counter()
            writer.wait()
            left = time.perf_counter() - trained
        return Timing(STEPS[device] * size.batch, trained - start, {"held": held, "longest": longest, "left": left})

    return in_turn


def figures(timings: Mapping[str, Sequence[Timing]]) -> dict[str, float]:
    """Medians over the rounds, in seconds; `longer by`: all of a round, than that without a checkpoint beside it."""
    found = {}
    for name in (BEFORE, BACKGROUND):
        pairs = list(zip(timings[name], timings[NONE], strict=True))
        for fact in ("held", "longest", "left"):
            found[f"{name}: {fact}"] = statistics.median(mine.facts[fact] for mine, _ in pairs)
        found[f"{name}: longer by"] = statistics.median(mine.seconds - none.seconds for mine, none in pairs)
    return found | {f"{NONE}: longest": statistics.median(none.facts["longest"] for none in timings[NONE])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(SIZES), default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="on the disk to write to; default: a temporary one")
    options = parser.parse_args()
    size = replace(SIZES[options.device]["vit_s"], batch=BATCH[options.device])
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        shared = {"size": size, "device": options.device, "threads": options.threads, "folder": Path(folder)}
        entrants = [Contender(name, prepare, {**shared, "name": name}) for name in (NONE, BEFORE, BACKGROUND)]
        timings = harness.interleave(entrants, options.rounds)
    ratios = [harness.memory(timings, BACKGROUND, BEFORE)]
    harness.table(f"ViT-S/16 {size}", timings, ratios)
    seconds = figures(timings)
    for name, value in seconds.items():
        harness.say(f"  {name:<44} {value:8.3f} s")
    settings = asdict(size) | {"steps": STEPS[options.device], "medians_s": seconds}
    tables = {"vit_s": harness.summary(settings, timings, ratios)}
    harness.write(f"saving-{options.device}", options.threads, options.device, tables)


if __name__ == "__main__":
    main()
