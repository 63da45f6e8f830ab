"""Images a second of what `benchmarks.objectives` pretrains, on one thread."""

import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.objectives_rows import SHAPE, Row

STEPS = 8  # of a round


def rounds_of(row: Row, data: Path) -> Callable[[], harness.Timing]:
    """One row's steps, as its recipe trains, for `harness.interleave`."""
    import torch

    from mpp.execution import choose, forward_pass
    from mpp.loop import build_optimizer, update
    from mpp.recipe import load_recipe
    from mpp.run.images import open_images
    from mpp.run.start import at_start

    torch.set_num_threads(1)
    length = ("train.images=1_000_000", "train.warmup=0", "train.epochs=null")
    recipe = load_recipe(
        row.recipe, [*SHAPE, *length, "data.val=null", f"data.path={data}", *row.encoder, *row.settings]
    )
    images = open_images(recipe, None, lambda what, make: make())
    config = recipe.in_steps(len(images.batches.index)).train
    objective = at_start(recipe).train()
    execution = choose(objective, images.batches, config)
    optimizer, forward = build_optimizer(objective, config), forward_pass(objective, config, execution)
    batches = [images.batches.at(step) for step in range(4)]
    numbers = itertools.count(1)

    def steps() -> harness.Timing:
        start = 0.0
        for number in range(1 + STEPS):
            start = time.perf_counter() if number == 1 else start  # the first warms up
            step = next(numbers)
            batch = batches[step % len(batches)]
            update(forward, objective, optimizer, batch, config, execution.micro_batch, 0, step)
            objective.after_step(0.5)
        return harness.Timing(STEPS * config.batch, time.perf_counter() - start)

    return steps


def speed(data: Path, rows: dict[str, Row], rounds: int) -> dict[str, Any]:
    """Images a second of every row: medians of rounds that took turns, and all rounds."""
    contenders = [harness.Contender(name, rounds_of, {"row": row, "data": data}) for name, row in rows.items()]
    timings = harness.interleave(contenders, rounds)
    return {
        name: {
            "images/s": statistics.median(run.rate for run in runs),
            "peak MiB": runs[-1].peak_mib,
            "rounds": [{"images/s": run.rate, "foreign cores": run.foreign_cores} for run in runs],
        }
        for name, runs in timings.items()
    }
