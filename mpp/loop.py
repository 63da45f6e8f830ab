"""The training loop: pretraining, and every other way of training an encoder, is this one."""

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mpp import checkpoint
from mpp.batch import Batch
from mpp.hardware import DeviceName, device_of, multiplies_bfloat16
from mpp.log import Log, LogConfig
from mpp.objectives import Objective
from mpp.optim import ema_decay, gradient_norm, learning_rate, parameter_groups
from mpp.seeds import seed_of
from mpp.watch import Clock, Interrupted, TrainingError, stop_signals

Loss = tuple[Tensor, dict[str, Tensor]]
PICTURED = 8  # images of a picture grid
PICTURE_SEED = 1  # the same for all pictures of a run, which then show the same patches corrupted
# Tokens of a micro-batch on a CPU: below, throughput grows with the batch; above, activations leave the caches and take
# memory (`python -m benchmarks.step --sizes tiny32 --micro-batches 16 32 128`).
CPU_TOKENS = 8192


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Exactly one of steps, epochs and images says how long; the warm-up is counted in the same unit."""

    steps: int | None = None  # optimizer updates
    epochs: float | None = None
    images: int | None = None
    warmup: float = 0
    batch: int = 4096  # images an update, over all micro-batches
    micro_batch: int | Literal["auto"] = "auto"  # images a forward pass; divides `batch`
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: float = 2e-4  # peak, for `batch` images; never rescaled
    min_lr: float = 0.0  # that the cosine ends at
    layer_decay: float = 1.0  # of the rate, from each of the encoder's layers to the one below it
    betas: tuple[float, float] = (0.9, 0.999)  # the first is sgd's momentum
    weight_decay: float = 0.0  # of weights of linear and convolution layers only; adam and sgd add it to the gradient
    clip: float | None = 1.0  # norm of all gradients together
    ema: float = 0.0  # decay of a running average of all parameters, which is then the result; 0 for none
    precision: Literal["auto", "bfloat16", "float32"] = "auto"  # of forward and backward passes
    device: DeviceName = "auto"
    threads: int | None = None  # of the CPU's arithmetic, on which its last bits depend; torch's number where not given
    compile: bool | None = None  # where not given: on CUDA
    activation_checkpointing: bool = False  # keep only what goes into each block, and compute the rest again: slower
    deterministic: bool = False  # bit-equal runs on CUDA too, at some cost; on the CPU they always are
    save_every: int = 500  # steps between checkpoints
    keep: int = 2  # checkpoints kept

    def __post_init__(self) -> None:
        for name in ("batch", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        if self.micro_batch != "auto" and (self.micro_batch < 1 or self.batch % self.micro_batch):
            raise ValueError(f"train.batch ({self.batch}) must be a multiple of train.micro_batch ({self.micro_batch})")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"train.threads must be at least 1, got {self.threads}")
        if self.lr <= 0 or self.weight_decay < 0 or self.warmup < 0:
            raise ValueError("train.lr must be above 0, and train.weight_decay and train.warmup at least 0")
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"train.min_lr must be in [0, train.lr], got {self.min_lr}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"train.layer_decay must be in (0, 1], got {self.layer_decay}")
        if not 0 <= self.ema < 1 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"train.ema and train.betas must be in [0, 1), got {self.ema} and {self.betas}")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"train.clip must be above 0, or null for none, got {self.clip}")


@dataclass(frozen=True)
class EvalConfig:
    """Scoring the objective on `data.val` while training."""

    every: int = 1000  # steps
    images: int = 10_000  # of the split, at most

    def __post_init__(self) -> None:
        if self.every < 1 or self.images < 1:
            raise ValueError(f"eval.every and eval.images must be at least 1, got {self.every} and {self.images}")


class Images(Protocol):
    """Where batches come from; `mpp.read_shards` gives one."""

    def at(self, step: int) -> Batch: ...

    def iterate(self, start: int, stop: Sequence[int] = ()) -> Iterator[Batch]:
        """Yields the batches from `start` on; ends early, instead of waiting for one, once `stop` holds something."""


def train(
    objective: Objective,
    batches: Images,
    config: TrainConfig,
    *,
    out: Path,
    seed: int = 0,
    log: LogConfig | None = None,
    evaluate: Callable[[Sequence[int]], dict[str, float]] | None = None,
    evaluate_every: int = 1000,
) -> None:
    """Trains `objective` up to step `config.steps`, from the last whole checkpoint below `out` if there is one.

    evaluate: gives figures to log every `evaluate_every` steps and at the end. What it is called with is a list that
        holds something as soon as a signal asks to stop.

    The losses of all steps, and so the weights at the end, are the same however often a run was interrupted, bit for
    bit on the CPU. Raises TrainingError if a loss or gradient is not finite, and Interrupted after SIGINT or SIGTERM.
    """
    device, log, steps = device_of(config.device), log or LogConfig(), config.steps or 0
    config = settled(objective, batches, config)
    torch.set_num_threads(config.threads or 1)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it torch refuses CUDA's matrix products
    torch.use_deterministic_algorithms(config.deterministic)
    objective.to(device).train()
    optimizer = build_optimizer(objective, config)
    ema = [value.clone() for value in averaged(objective).values()] if config.ema else []
    start = resume(objective, optimizer, ema, out / "checkpoints")
    forward = forward_pass(objective, config)
    clock = Clock(config.lr)
    # Read once: the first batch of streamed shards may have to be fetched again.
    shown = functools.cache(lambda: next(batches.at(0).split(PICTURED)).to(device))
    with Log(out, start, steps, log.tensorboard) as logger, stop_signals() as signals:
        read, step = clock.waits(batches.iterate(start, signals), signals), start
        for step, batch in zip(range(start + 1, steps + 1), read, strict=False):
            loss, norm, metrics = update(forward, objective, optimizer, batch.to(device), config, seed, step)
            objective.after_step(step / steps)
            average(ema, objective, ema_decay(step, config.ema))
            clock.count(step, loss, norm, len(batch))
            logger.advance()
            last, ends = step == steps, step == steps or bool(signals)
            logs, saves = due(step, log.every, ends), due(step, config.save_every, ends)
            scores, shows = due(step, evaluate_every if evaluate else 0, last), due(step, log.pictures, last)
            if logs or saves:
                clock.check()  # one wait for the device a log
            if logs:
                values = {"loss": loss, **metrics, "norm": norm}
                rate = {"lr": optimizer.param_groups[0]["lr"]}
                logger.scalars(step, {k: v.item() for k, v in values.items()} | rate | clock.figures(device))
            if scores or shows:
                with clock.stopped(), swapped(objective, ema):
                    if evaluate and scores:
                        logger.scalars(step, evaluate(signals))
                    if shows:
                        logger.pictures(step, pictures(objective, shown()))
            if saves:
                with clock.stopped():
                    save(objective, optimizer, ema, out / "checkpoints", step, config.keep)
            if ends and not last:  # a signal since then waits until the next step is saved
                raise Interrupted(signals[0], step)
        if step < steps:  # a signal came while a batch was waited for
            if step > start:
                save(objective, optimizer, ema, out / "checkpoints", step, config.keep)
            raise Interrupted(signals[0], step)
    adopt(objective, ema)


def due(step: int, every: int, last: bool) -> bool:
    """Whether something that happens every so many steps (0: never), and at the last, happens now."""
    return every > 0 and (last or step % every == 0)


def update(
    forward: Callable[[Batch], Loss],
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    config: TrainConfig,
    seed: int,
    step: int,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """One optimizer step: the loss, the norm of the gradient, and what the objective reports, all on the device."""
    assert isinstance(config.micro_batch, int), "settled() comes first"
    rate = learning_rate(
        step - 1, peak=config.lr, steps=config.steps or 0, warmup=int(config.warmup), end=config.min_lr
    )
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
    totals: dict[str, Tensor] = {}
    for place, part in enumerate(batch.split(config.micro_batch)):
        torch.manual_seed(seed_of(seed, step, place))
        loss, metrics = forward(part)
        share = len(part) / len(batch)
        (loss * share).backward()
        for name, value in {"loss": loss.detach(), **metrics}.items():
            totals[name] = totals.get(name, 0) + value * share
    norm = gradient_norm(objective.parameters(), config.clip)
    optimizer.step()
    optimizer.zero_grad()
    return totals.pop("loss"), norm, totals


def forward_pass(objective: Objective, config: TrainConfig) -> Callable[[Batch], Loss]:
    """The forward pass in the precision of `config`; parameters and their gradients are float32 in either.

    In bfloat16 on a CPU the parameters are cast once a pass and all activations follow, which is faster than autocast's
    casts of single operations. With `compile`, and on CUDA, it is autocast. Losses are float32 everywhere.
    """
    device = device_of(config.device)
    objective.encoder.activation_checkpointing = config.activation_checkpointing
    if config.compile:
        objective.compile()
    if config.precision == "float32":
        return objective
    if device.type == "cpu" and not config.compile:
        norms = {id(p) for part in objective.modules() if isinstance(part, nn.BatchNorm2d) for p in part.parameters()}
        # Batch norm's statistics are float32 buffers, with which PyTorch takes float32 parameters only.
        lowered = [(name, p) for name, p in objective.named_parameters() if id(p) not in norms]

        def cast(batch: Batch) -> Loss:
            low = {name: parameter.bfloat16() for name, parameter in lowered}
            return functional_call(objective, low, (batch,))

        return cast

    def autocast(batch: Batch) -> Loss:
        with torch.autocast(device.type, torch.bfloat16):
            return objective(batch)

    return autocast


def settled(objective: Objective, batches: Images, config: TrainConfig) -> TrainConfig:
    """`config` with a plain value for whatever it leaves to this machine: precision, compile, threads, micro_batch."""
    device = device_of(config.device)
    if config.threads is None:
        config = replace(config, threads=torch.get_num_threads())
    if config.precision == "auto":
        config = replace(config, precision="bfloat16" if multiplies_bfloat16(device) else "float32")
    if config.compile is None:
        config = replace(config, compile=device.type == "cuda")
    if config.micro_batch != "auto":
        return config
    if objective.encoder.looks_across_batch:
        return replace(config, micro_batch=config.batch)
    sizes = [size for size in range(config.batch, 0, -1) if config.batch % size == 0]
    if device.type == "cuda":
        return replace(config, micro_batch=_largest_that_fits(objective.to(device), batches, config, sizes))
    tokens = objective.encoder.tokens
    return replace(config, micro_batch=next((size for size in sizes if size * tokens <= CPU_TOKENS), 1))


def _largest_that_fits(objective: Objective, batches: Images, config: TrainConfig, sizes: list[int]) -> int:
    """The first of falling sizes whose forward and backward pass fits in the GPU's memory."""
    device, plain = device_of(config.device), replace(config, compile=False)  # eager needs the most memory
    images = batches.at(0).to(device)
    forward = forward_pass(objective, plain)
    # Held while trying: room for Adam's two averages and a running one, which come later.
    room = [torch.empty_like(parameter) for parameter in objective.parameters() for _ in range(3)]  # noqa: F841
    for size in sizes:
        try:
            forward(next(images.split(size)))[0].backward()
            return size
        except torch.OutOfMemoryError:
            continue
        finally:
            objective.zero_grad()
            torch.cuda.empty_cache()
    raise TrainingError("train.micro_batch: not even one image fits in the GPU's memory; take a smaller model or image")


def build_optimizer(objective: Objective, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer over the parameter groups, in one kernel a step."""
    groups = parameter_groups(objective, config.weight_decay, config.layer_decay, objective.encoder)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.betas[0], fused=True)
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[config.optimizer]
    return kind(groups, lr=config.lr, betas=config.betas, fused=True)


def resume(objective: Objective, optimizer: torch.optim.Optimizer, ema: list[Tensor], folder: Path) -> int:
    """Puts the newest whole checkpoint below `folder` back; its step, or 0 if there is none."""
    found = checkpoint.load_latest(folder)
    if found is None:
        return 0
    step, state = found
    checkpoint.restore(objective, optimizer, state)
    if ema and "ema" not in state:
        raise checkpoint.CheckpointError(f"{folder}: holds no running average to go on with; start with train.ema=0")
    for name, value in zip(averaged(objective), ema, strict=False):
        value.copy_(state["ema"][name])
    return step


def save(
    objective: Objective, optimizer: torch.optim.Optimizer, ema: list[Tensor], folder: Path, step: int, keep: int
) -> None:
    """Writes a checkpoint; the encoder's config goes with the weights, so that they can be loaded alone."""
    state = {"model": objective.state_dict(), "optimizer": checkpoint.optimizer_state(objective, optimizer)}
    if ema:
        # With what is not averaged, batch norm's counters, so that an encoder can be loaded from this file alone.
        state["ema"] = state["model"] | dict(zip(averaged(objective), ema, strict=True))
    metadata = {"encoder": json.dumps(asdict(objective.encoder.config))}
    checkpoint.save(folder, step, state, metadata, keep)


def averaged(objective: Objective) -> dict[str, Tensor]:
    """What a running average is taken of: the parameters, and statistics such as batch norm's."""
    return {name: value for name, value in objective.state_dict().items() if value.is_floating_point()}


@torch.no_grad()
def average(ema: list[Tensor], objective: Objective, decay: float) -> None:
    """Moves the running average towards the parameters."""
    if ema:
        torch._foreach_lerp_(ema, list(averaged(objective).values()), 1 - decay)


@torch.no_grad()
def adopt(objective: Objective, values: Iterable[Tensor]) -> None:
    """Copies values into the parameters, if there are any."""
    for own, value in zip(averaged(objective).values(), values, strict=False):
        own.copy_(value)


@contextlib.contextmanager
def swapped(objective: Objective, ema: list[Tensor]) -> Iterator[None]:
    """Puts the running average in the parameters' place, if there is one."""
    own = [value.clone() for value in averaged(objective).values()] if ema else []
    adopt(objective, ema)
    try:
        yield
    finally:
        adopt(objective, own)


def pictures(objective: Objective, batch: Batch) -> dict[str, Tensor]:
    """What the objective shows of some images."""
    torch.manual_seed(PICTURE_SEED)
    return objective.pictures(batch)
