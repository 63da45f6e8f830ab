"""What a recipe takes, before anything is paid for: parameters, FLOPs, memory, steps and, measured, time."""

import importlib.metadata
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from mpp.batch import Batch
from mpp.counts import activation_bytes, cost, noise, parameters
from mpp.data.chosen import chosen
from mpp.data.read import epoch_of
from mpp.execution import choose, forward_pass
from mpp.files import write_atomically
from mpp.fleet import Fleet, Measured, averages, planned
from mpp.hardware import device_of
from mpp.jsons import encoded
from mpp.loop import build_optimizer, steps_of, update
from mpp.recipe import Recipe
from mpp.remote.urls import is_url
from mpp.run.start import at_start, with_index
from mpp.shards.index import Index, splits
from mpp.train_config import Execution

MEASURED_STEPS = 5  # after one that is not counted
MIB = 2**20
FORMAT = 1  # of the JSON


class RandomImages:
    """Batches of noise in the shape that a recipe reads: what a step costs does not depend on the pictures."""

    def __init__(self, recipe: Recipe, images: int) -> None:
        self.recipe, self.images = recipe, images

    @cached_property
    def batch(self) -> Batch:
        """Made when it is asked for: on a CPU no pixels are needed to choose a micro-batch."""
        return noise(self.recipe, self.images, partial(torch.randint, 0, 256))

    def at(self, step: int) -> Batch:
        return self.batch

    def iterate(self, start: int = 0, stop: Sequence[int] = ()) -> Iterator[Batch]:
        while True:
            yield self.batch


@dataclass(frozen=True)
class Plan:
    """What a recipe takes, as lines and as figures."""

    rows: list[tuple[str, str]]
    figures: dict[str, Any]

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.rows)
        return "\n".join(f"{name:{width}}  {value}" for name, value in self.rows)

    def save(self, path: Path) -> None:
        write_atomically(path, encoded(self.figures, indent=1))


def plan(recipe: Recipe, *, measure: bool = False, fleet: Fleet | None = None) -> Plan:
    """What the recipe takes on this machine, or on many GPUs; `measure` times a few of its steps on this machine.

    Raises PlanError for GPUs among which the batch can't be divided, and for a speed of another device or recipe.
    """
    if fleet and measure:
        fleet.check_device(device_name(recipe), "--measure")
    index = trained_on(recipe)
    images, steps = length(recipe, index)
    if index is not None:
        recipe = with_index(recipe, index).in_steps(epoch_of(len(index), recipe.data))
    totals, rows = counted_rows(recipe)
    figures = {"format": FORMAT, "recipe": recipe.name, "batch": recipe.train.batch, "images": images, **totals}
    figures["versions"] = {name: importlib.metadata.version(name) for name in ("mpp", "torch")}
    execution = None
    if measure or not fleet:
        execution = choose(at_start(recipe), RandomImages(recipe, recipe.train.batch), recipe.train)
    if execution and not fleet:
        rows.append(("micro-batch", f"{execution.micro_batch} of {recipe.train.batch} images, {execution.precision}"))
        kept = activation_bytes(recipe, execution)
        rows.append(("memory", memory(recipe, totals["parameters"], totals["not_trained"], kept)))
    rows += [*steps, ("rate", schedule(recipe))]
    if images:
        rows.append(("FLOPs in all", f"{totals['flops_an_image'] * images:.3g}"))
    if execution and measure:
        speed = measured(recipe, execution)
        figures["measured"] = {"device": device_name(recipe), "images/s": speed, **asdict(execution)}
        rows.append(("speed here", f"{speed:,.1f} images/s on {device_of(recipe.train.device)}"))
        if images:
            rows.append(("time here", f"{duration(images / speed)} without evaluation"))
        if fleet:
            fleet = replace(fleet, measured=Measured(device_name(recipe), speed, totals["flops_an_image"], "--measure"))
    if fleet:
        more, estimated = planned(recipe, fleet, totals, images, duration)
        rows, figures = rows + more, figures | estimated
    return Plan(rows, figures)


def counted_rows(recipe: Recipe) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Parameters and FLOPs of the recipe: all together by name, and the lines that say them by part."""
    trained, others, flops = parameters(recipe), parameters(recipe, trained=False), cost(recipe)
    rows = []
    for name, counts in {"parameters": trained, "not trained": others}.items():
        if counts:
            rows.append((name, f"{sum(counts.values()):,}"))
            rows += [(f"  {part}", f"{count:,}") for part, count in counts.items()]
    if recipe.view_sizes:
        sizes = Counter(f"{height}x{width}" for height, width in [recipe.model.image, *recipe.view_sizes])
        rows.append(("views", ", ".join(f"{count} of {size}" for size, count in sizes.items())))
    rows.append(("FLOPs an image", f"{flops / 1e9:.3g} GFLOP (matrix products, forward and backward)"))
    totals = {"parameters": sum(trained.values()), "not_trained": sum(others.values()), "flops_an_image": flops}
    return totals, rows


def device_name(recipe: Recipe) -> str:
    """The device of the recipe on this machine, a GPU as PyTorch names it."""
    device = device_of(recipe.train.device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def memory(recipe: Recipe, trained: int, others: int, activations: int) -> str:
    """An estimate: parameters, gradients, the optimizer's averages and a running one, and a micro-batch's activations.

    What is not trained, such as a teacher, has neither gradients nor averages of the optimizer.
    """
    running = int(recipe.train.ema > 0)
    state = 4 * (trained * (2 + averages(recipe.train) + running) + others * (1 + running)) / MIB
    kept = activations / MIB
    return f"about {state + kept:,.0f} MiB: {state:,.0f} of parameters and optimizer, {kept:,.0f} of activations"


def trained_on(recipe: Recipe) -> Index | None:
    """The images of `data.path` to train on, if their shards are there already."""
    data = recipe.data
    there = is_url(data.path) or (Path(data.path).is_dir() and data.train in splits(data.path))
    return chosen(data, recipe.seed, recipe.objective.needs.labels)[0][0] if there else None


def length(recipe: Recipe, index: Index | None) -> tuple[int, list[tuple[str, str]]]:
    """Images seen in all, 0 if only shards that are not there would tell, and how to say it."""
    if index is not None:
        epoch = epoch_of(len(index), recipe.data)
        steps = steps_of(recipe.in_steps(epoch).train)
        seen = steps * recipe.train.batch
        return seen, [("steps", f"{steps:,} = {seen / epoch:,.1f} epochs of {epoch:,} images")]
    unit, amount = recipe.duration
    if unit == "epochs":
        return 0, [
            ("steps", f"{amount:g} epochs; {recipe.data.path} has no shards yet that would tell how many steps that is")
        ]
    steps = steps_of(recipe.in_steps(1).train)
    return steps * recipe.train.batch, [("steps", f"{steps:,}")]


def schedule(recipe: Recipe) -> str:
    """How the learning rate goes; in steps, where the images that would tell are there."""
    train, (unit, amount) = recipe.train, recipe.duration
    warmup = f"after {train.warmup:,g} {unit} of warm-up" if train.warmup else "without warm-up"
    if train.schedule == "cosine":
        return f"{train.lr:g}, a cosine down to {train.min_lr:g} {warmup}"
    constant = train.constant_until if unit == "steps" else amount * (1 - train.decay_share)
    until = f"until {constant:,g} of {amount:,g} {unit} (that checkpoint is kept)"
    return f"{train.lr:g}, constant {warmup} {until}, then down to {train.min_lr:g}"


def measured(recipe: Recipe, execution: Execution) -> float:
    """Images a second of the training step on this machine, data and logging left out."""
    device, config = (
        device_of(recipe.train.device),
        replace(recipe.train, steps=1000, epochs=None, images=None, warmup=0),
    )
    objective = at_start(recipe).to(device)
    batch = RandomImages(recipe, recipe.train.batch).batch.to(device)
    optimizer, forward = build_optimizer(objective, config), forward_pass(objective, config, execution)
    times = []
    for step in range(1, MEASURED_STEPS + 2):
        start = time.perf_counter()
        loss, _, _ = update(forward, objective, optimizer, batch, config, execution.micro_batch, recipe.seed, step)
        loss.item()  # waits for the device
        times.append(time.perf_counter() - start)
    return len(batch) / sorted(times[1:])[MEASURED_STEPS // 2]


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
