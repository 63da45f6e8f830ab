"""What a recipe takes, before anything is paid for: parameters, FLOPs, memory, steps and, measured, time."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from mpp.batch import Batch
from mpp.data.chosen import chosen
from mpp.data.read import epoch_of
from mpp.execution import choose, forward_pass
from mpp.hardware import device_of
from mpp.loop import build_optimizer, steps_of, update
from mpp.models.encoders import build_encoder
from mpp.models.trunk import Block
from mpp.objectives import build_objective
from mpp.objectives.base import Objective
from mpp.recipe import Recipe
from mpp.remote.urls import is_url
from mpp.run.start import at_start, with_index
from mpp.shards.index import Index, splits
from mpp.train_config import Execution

MEASURED_STEPS = 5  # after one that is not counted
COUNTED = 2  # images on which costs are counted: batch norm takes no single one
MIB = 2**20


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


def plan(recipe: Recipe, *, measure: bool = False) -> str:
    """A table of what the recipe takes; `measure` times a few of its steps on this machine."""
    index = trained_on(recipe)
    images, steps = length(recipe, index)
    if index is not None:
        recipe = with_index(recipe, index).in_steps(epoch_of(len(index), recipe.data))
    execution = choose(at_start(recipe), RandomImages(recipe, recipe.train.batch), recipe.train)
    trained, others = parameters(recipe), parameters(recipe, trained=False)
    rows = []
    for name, counts in {"parameters": trained, "not trained": others}.items():
        if counts:
            rows.append((name, f"{sum(counts.values()):,}"))
            rows += [(f"  {part}", f"{count:,}") for part, count in counts.items()]
    flops, activations = cost(recipe), activation_bytes(recipe, execution)
    if recipe.view_sizes:
        sizes = Counter(f"{height}x{width}" for height, width in [recipe.model.image, *recipe.view_sizes])
        rows.append(("views", ", ".join(f"{count} of {size}" for size, count in sizes.items())))
    rows.append(("FLOPs an image", f"{flops / 1e9:.3g} GFLOP (matrix products, forward and backward)"))
    rows.append(("micro-batch", f"{execution.micro_batch} of {recipe.train.batch} images, {execution.precision}"))
    rows.append(("memory", memory(recipe, sum(trained.values()), sum(others.values()), activations)))
    rows += [*steps, ("rate", schedule(recipe))]
    if images:
        rows.append(("FLOPs in all", f"{flops * images:.3g}"))
    if measure:
        speed = measured(recipe, execution)
        rows.append(("speed here", f"{speed:,.1f} images/s on {device_of(recipe.train.device)}"))
        if images:
            rows.append(("time here", f"{duration(images / speed)} without evaluation"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def on_meta(recipe: Recipe) -> Objective:
    """The recipe's objective on torch's "meta" device, which has shapes and no numbers."""
    with torch.device("meta"):
        return build_objective(build_encoder(recipe.model), recipe.objective)


def parameters(recipe: Recipe, *, trained: bool = True) -> dict[str, int]:
    """Parameters of each part of the encoder and of the objective: those that are trained, or the others."""
    counts: dict[str, int] = {}
    for name, parameter in on_meta(recipe).named_parameters():
        if parameter.requires_grad == trained:
            part = ".".join(name.split(".")[: 2 if name.startswith("encoder.") else 1])
            counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


def cost(recipe: Recipe) -> int:
    """FLOPs of one image, forward and backward, with what activation checkpointing computes twice.

    Counted, not computed: the objective runs on torch's "meta" device, which has shapes and no numbers.
    """
    objective = on_meta(recipe)
    objective.encoder.activation_checkpointing = recipe.train.activation_checkpointing
    with torch.device("meta"), FlopCounterMode(display=False, custom_mapping=COUNTERS) as counter:
        loss, _ = objective(noise(recipe, COUNTED))
        loss.backward()
    return counter.get_total_flops() // COUNTED


def convolution_backward_flops(
    gradient: Sequence[int], images: Sequence[int], weight: Sequence[int], *settings: Any, **shapes: Any
) -> int:
    """FLOPs of the gradients of a convolution: those of its forward pass for each that is wanted.

    PyTorch's own count takes a depthwise convolution for a whole one.
    """
    return 2 * math.prod(gradient) * math.prod(weight[1:]) * sum(settings[7][:2])


COUNTERS = {torch.ops.aten.convolution_backward: convolution_backward_flops}


def activation_bytes(recipe: Recipe, execution: Execution) -> int:
    """Bytes that the forward pass of a micro-batch keeps for the backward pass, in the precision of the recipe.

    Here the objective runs on stand-ins for the device's tensors, on which PyTorch chooses the kernels that it would
    choose there: a fused one keeps no scores of attention. With activation checkpointing a block keeps its input, and
    the largest block all else too, once.
    """
    blocks: dict[str, int] = {}  # bytes first kept in a block
    inputs = 0
    seen: set[int] = set()
    tensors: list[Tensor] = []  # alive, so that no two have the same address
    inside = ""

    def keep(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        if (key := id(tensor.untyped_storage())) not in seen:
            seen.add(key)
            blocks[inside] = blocks.get(inside, 0) + tensor.untyped_storage().nbytes()
        return tensor

    def enter(name: str, block: nn.Module, given: tuple[Any, ...]) -> None:
        nonlocal inside, inputs
        inside, inputs = name, inputs + given[0].untyped_storage().nbytes()

    def leave(block: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
        nonlocal inside
        inside = ""

    objective = on_meta(recipe)
    device = device_of(recipe.train.device)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device):
        objective.to_empty(device=device)
        for name, block in objective.encoder.named_modules():
            if isinstance(block, Block):
                block.register_forward_pre_hook(partial(enter, name))
                block.register_forward_hook(leave)
        seen.update(id(parameter.untyped_storage()) for parameter in objective.parameters())
        config, eager = replace(recipe.train, activation_checkpointing=False), replace(execution, compile=False)
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            forward_pass(objective, config, eager)(noise(recipe, execution.micro_batch))
    outside = blocks.pop("", 0)
    if recipe.train.activation_checkpointing:
        return outside + inputs + max(blocks.values(), default=0)
    return outside + sum(blocks.values())


def noise(recipe: Recipe, images: int, make: Callable[..., Tensor] = torch.empty) -> Batch:
    """A batch of that many images in the shapes that the recipe reads; by default nothing is written to it."""
    shapes = [(images, recipe.model.channels, *size) for size in (recipe.model.image, *recipe.view_sizes)]
    first, *views = (make(shape, dtype=torch.uint8) for shape in shapes)
    return Batch(first, torch.zeros(images, dtype=torch.int64), tuple(views))


def memory(recipe: Recipe, trained: int, others: int, activations: int) -> str:
    """An estimate: parameters, gradients, Adam's two averages and a running one, and a micro-batch's activations.

    What is not trained, such as a teacher, has neither gradients nor averages of the optimizer.
    """
    averaged = int(recipe.train.ema > 0)
    state = 4 * (trained * (4 + averaged) + others * (1 + averaged)) / MIB
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
