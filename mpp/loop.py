"""The training loop: pretraining, and every other way of training an encoder, is this one."""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpp import begun, checkpoint, jsons
from mpp.average import adopt, average, averaged, swapped
from mpp.batch import Batch
from mpp.checks import checked, checked_batch, facts_of_result, lasting, refuse_other_numbers
from mpp.data.batches import Batches
from mpp.data.loader import Images, as_batches
from mpp.execution import (
    Loss,
    callers_state,
    check_shares,
    choose,
    drawing,
    forward_pass,
    prepare_cuda,
    sharing,
)
from mpp.hardware import device_of
from mpp.log import Log, Unlogged
from mpp.models.encoder import feed
from mpp.objectives.base import Objective
from mpp.objectives.calls import called
from mpp.objectives.config import in_units
from mpp.optim import ema_decay, gradient_norm, learning_rate, parameter_groups, set_rates
from mpp.ranks import ALONE, Ranks, Turn
from mpp.saving import Writer, on_host
from mpp.sharding import shard, to_shard
from mpp.split import is_sharded, is_split, let_go, own_part, split_as, uncompiled
from mpp.train_config import Execution, LogConfig, TrainConfig
from mpp.watch import Clock, Interrupted, TrainingError, stop_signals

PICTURED = 8  # images of a picture grid
PICTURE_SEED = 1  # the same for all pictures of a run, which then show the same patches corrupted


@callers_state()
def train(
    objective: Objective,
    batches: Images | Iterable[Any],
    config: TrainConfig,
    *,
    out: Path | str,
    seed: int = 0,
    log: LogConfig | None = None,
    execution: Execution | None = None,
    evaluate: Callable[[Sequence[int]], dict[str, float]] | None = None,
    evaluate_every: int = 1000,
) -> None:
    """Trains `objective` up to step `config.steps`, from the last whole checkpoint below `out` if there is one.

    batches: what `mpp.read_shards` gives; or a DataLoader or another iterable of (images, labels), which is read again
        and again. An iterable has no place to go on from: interrupted, a run goes on, but with its beginning.
    execution: how, where that is chosen already; else what `config` leaves open is chosen here.
    evaluate: gives figures to log every `evaluate_every` steps and at the end. What it is called with is a list that
        holds something as soon as a signal asks to stop.

    The losses of all steps, and so the weights at the end, are the same however often a run was interrupted, bit for
    bit on the CPU. Torch's generators, number of threads and deterministic mode are the caller's again afterwards.
    Raises TrainingError if a loss or gradient is not finite, Interrupted after SIGINT, SIGTERM or SIGUSR1,
    CheckpointError if `out` holds a training with other settings, and ValueError for a config that does not say in
    steps how long.
    """
    out, images = Path(out), as_batches(batches)
    folder, settings = out / "checkpoints", begun.settings_of(objective, images, config, seed)
    config = begun.same(folder, settings, config, execution)
    device, log, steps = device_of(config.device), log or LogConfig(), steps_of(config)
    ranks = sharing(images)
    check_shares(objective, config, ranks)
    if isinstance(images, Batches):
        feed(objective, images.input)
    refuse_other_numbers(objective, images)
    described = {"encoder": jsons.text(facts_of_result(objective))}  # goes with the weights of every checkpoint
    evaluation = evaluate_every if evaluate else 0
    kept = kept_steps(config)
    execution = execution or choose(objective, images, config)
    torch.set_num_threads(execution.threads)
    ranks.announce(execution.threads, device)
    prepare_cuda(config)
    torch.use_deterministic_algorithms(config.deterministic)
    objective.train()
    if ranks.size > 1 and objective.encoder.looks_across_batch:
        nn.SyncBatchNorm.convert_sync_batchnorm(objective)  # in place, names and numbers as they are
    if not to_shard(config, ranks):
        objective.to(device)
    ranks.spread(objective.state_dict().values())
    if to_shard(config, ranks):
        shard(objective, config, execution)
    optimizer = build_optimizer(objective, config)
    ema = [value.clone() for value in averaged(objective).values()] if config.ema else []
    start = resume(objective, optimizer, ema, folder, ranks)
    objective.progress.fill_(start / steps)
    forward = checked(objective, forward_pass(objective, config, execution), ranks)
    clock = Clock(config.lr)
    record = functools.cache(lambda: begun.write(folder, settings, execution))  # once, before the first checkpoint
    # Read once: the first batch of streamed shards may have to be fetched again.
    shown = functools.cache(lambda: next(images.at(0).split(PICTURED)).to(device))
    metrics_beside_bar = ("loss", *list(objective.config.metrics)[:1], "images/s")
    opened = Log(out, start, steps, log.tensorboard, metrics_beside_bar) if ranks.leads else Unlogged()
    writer = Writer(folder, described, config.keep, kept)
    with opened as logger, stop_signals() as signals, writer:

        def keep(step: int) -> None:
            if ranks.leads:
                record()
                writer.wait()  # before another copy of all there is
            if ranks.leads or is_sharded(objective):
                state = snapshot(objective, optimizer, ema, ranks.leads)
            if ranks.leads:
                writer.write(step, state)

        def asked() -> int:
            """The signal that a process by itself obeys at once; several hear of it together, before a step."""
            return sum(signals[:1]) if ranks.size == 1 else 0

        def look(step: int, scores: bool, shows: bool) -> int:
            """Scores and shows what a step left, unless a signal comes, which it gives: the next start does it then,
            and no other step may come before."""
            if not (scores or shows) or asked():
                return asked()
            with clock.stopped(), swapped(objective, ema):
                if evaluate and scores and (figures := evaluate(signals)):
                    logger.scalars(step, figures)
                if shows and not asked():
                    logger.pictures(step, pictures(objective, shown()))
            return ranks.turn(signals, ()).stop

        step, stop, saves = start, 0, False
        if start:  # what was interrupted after this step was saved
            scores, shows = (due(start, every, start == steps) for every in (evaluation, log.pictures))
            done = ranks.shared(lambda: [logger.scored(start), logger.pictured(start)])
            stop = look(start, scores and not done[0], shows and not done[1])
        read = clock.waits(images.iterate(start, signals), signals)
        while step < steps and not stop:
            batch = next(read, None)
            turn = ranks.turn(signals, batch)
            if batch is None or turn.ended:  # a signal came while a batch was waited for
                stop = turn.stop
                break
            step += 1
            writer.check()
            if objective.needs.pairs and turn.first % 2:
                raise TrainingError(
                    f"step {step}: process {ranks.rank} of {ranks.size} has a batch's images from number {turn.first} "
                    f"on, expected an even one: {objective.config.name} mixes each image with its neighbour"
                )
            batch, share = placed(batch, turn), turn.images / ranks.size
            if objective.needs.whole_batch:  # each process computes all of it, and the same
                batch, share = ranks.joined(batch), turn.images
            batch = checked_batch(objective, batch, step).to(device)
            loss, norm, metrics = update(
                forward, objective, optimizer, batch, config, execution.micro_batch, seed, step, ranks, share
            )
            objective.progress.fill_(step / steps)
            with called(objective.config.name, "after_step()"):
                objective.after_step(step / steps)
            average(ema, objective, ema_decay(step, config.ema))
            clock.count(step, loss, norm, turn.images)
            logger.advance()
            stop = turn.stop or asked()
            last, ends = step == steps, step == steps or stop > 0
            logs, saves = due(step, log.every, ends), due(step, config.save_every, ends or step in kept)
            scores, shows = due(step, evaluation, last), due(step, log.pictures, last)
            if logs or saves or scores or shows:
                clock.check()  # one wait for the device a log
            if saves:
                clock.check_tensors(step, lasting(objective, ema))
            if logs:
                with called(objective.config.name, "metrics"):  # checked at the first step; later ones may differ
                    values = {key: float(value) for key, value in {"loss": loss, **metrics, "norm": norm}.items()}
                values = in_units(objective.config.metrics, mean_figures(ranks.gathered([len(batch), values])))
                rate = {"lr": rate_at(step, config)}
                logger.scalars(step, values | rate | clock.figures(device))
            if saves:  # before what takes long, and may be interrupted
                with clock.stopped():
                    keep(step)
            if not stop:
                stop = look(step, scores, shows)
        if stop and step > start and not saves:
            clock.check()
            clock.check_tensors(step, lasting(objective, ema))
            keep(step)
        writer.wait()
        stop = stop or ranks.turn(signals, ()).stop
        if stop:
            raise Interrupted(stop, step)
    adopt(objective, ema)


def placed(batch: Batch, turn: Turn) -> Batch:
    """The batch with its images' places in that of all processes, where it does not say them."""
    return batch if batch.places is not None else replace(batch, places=turn.first + np.arange(len(batch)))


def mean_figures(parts: Sequence[Any]) -> dict[str, float]:
    """The mean of figures that each process has of so many images."""
    found = {}
    for name in dict.fromkeys(name for _, values in parts for name in values):
        having = [(count, values[name]) for count, values in parts if name in values]
        found[name] = sum(count * value for count, value in having) / sum(count for count, _ in having)
    return found


def due(step: int, every: int, last: bool) -> bool:
    """Whether something that happens every so many steps (0: never), and at the last, happens now."""
    return every > 0 and (last or step % every == 0)


def steps_of(config: TrainConfig) -> int:
    """How many steps to train; ValueError where a config counts in epochs or images, which a recipe's loader knows."""
    if config.steps is None or config.steps < 1 or not float(config.warmup).is_integer():
        raise ValueError(
            f"train.steps must be at least 1 and train.warmup a whole number of steps, got {config.steps} and "
            f"{config.warmup}; epochs and images are for recipes"
        )
    return config.steps


def rate_at(step: int, config: TrainConfig) -> float:
    """The learning rate of step 1, 2, ..."""
    steps, warmup, constant = steps_of(config), int(config.warmup), config.constant_until
    return learning_rate(step - 1, peak=config.lr, steps=steps, warmup=warmup, end=config.min_lr, constant=constant)


def kept_steps(config: TrainConfig) -> tuple[int, ...]:
    """The steps whose checkpoints are kept for good: the last before the rate falls, from which longer runs go on."""
    constant = config.constant_until
    return (constant,) if constant else ()


def update(
    forward: Callable[[Batch], Loss],
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    config: TrainConfig,
    micro_batch: int,
    seed: int,
    step: int,
    ranks: Ranks = ALONE,
    images: float = 0.0,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """One optimizer step: the loss, the norm of the gradient, and what the objective reports, all on the device.

    images: of a process, the mean over all of them. What is reported is of this one's, but for the loss.
    """
    set_rates(optimizer, rate_at(step, config), (step - 1) / steps_of(config))
    totals: dict[str, Tensor] = {}
    whole = objective.batch_weight(batch)
    if ranks.size > 1:  # gradients are averaged over the processes, whose parts may weigh differently
        whole = ranks.average([whole])[0] if isinstance(whole, Tensor) else images
    for place, part in enumerate(batch.split(micro_batch)):
        with drawing(seed, step, part, place):
            loss, metrics = forward(part)
            loss = loss * (objective.batch_weight(part) / whole)
            loss.backward()
        share = len(part) / len(batch)
        for name, value in {"loss": loss.detach(), **{name: value * share for name, value in metrics.items()}}.items():
            totals[name] = totals.get(name, 0) + value
    if ranks.size > 1:
        totals["loss"] = average_gradients(objective, totals["loss"], ranks)
    norm = gradient_norm(objective.parameters(), config.clip)
    optimizer.step()
    optimizer.zero_grad()
    return totals.pop("loss"), norm, totals


def average_gradients(objective: Objective, loss: Tensor, ranks: Ranks) -> Tensor:
    """Makes every process's gradients the mean of all, and gives the mean of their losses: one call for all of them.

    FSDP has averaged those of split weights already.
    """
    found = [(parameter, parameter.grad) for parameter in objective.parameters()]
    trained = [(parameter, grad) for parameter, grad in found if grad is not None and not is_split(grad)]
    *gradients, loss = ranks.average([*(grad for _, grad in trained), loss])
    for (parameter, _), gradient in zip(trained, gradients, strict=True):
        parameter.grad = gradient
    return loss


def build_optimizer(objective: Objective, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer over the parameter groups, in one kernel a step."""
    groups = parameter_groups(
        objective, config.weight_decay, config.layer_decay, objective.encoder, scale=objective.scale
    )
    if config.optimizer == "sgd":
        fused = not is_sharded(objective)  # of DTensors PyTorch 2.11 has no fused one
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.betas[0], fused=fused, foreach=not fused)
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[config.optimizer]
    return kind(groups, lr=config.lr, betas=config.betas, fused=True)


def resume(
    objective: Objective, optimizer: torch.optim.Optimizer, ema: list[Tensor], folder: Path, ranks: Ranks = ALONE
) -> int:
    """Puts the newest whole checkpoint below `folder` back, as the leading process reads it; its step, or 0 if there
    is none."""
    found, read = (checkpoint.load_latest(folder) if ranks.leads else None) or (0, {})
    step: int = ranks.shared(lambda: found)
    if not step:
        return 0
    parts = {name: value for name, value in objective.state_dict().items() if is_split(value)}

    def own(name: str, value: Tensor) -> Tensor:
        like = parts.get(name, parts.get(name.rpartition("/")[0]))  # an optimizer's are named PARAMETER/ENTRY
        return value if like is None else split_as(like, value)

    state = {name: ranks.of_leading(read.get(name), own) for name in ranks.shared(lambda: list(read))}
    checkpoint.restore(objective, optimizer, state)
    if ema and "ema" not in state:
        raise checkpoint.CheckpointError(f"{folder}: holds no running average to go on with; start with train.ema=0")
    for name, value in zip(averaged(objective), ema, strict=False):
        own_part(value).copy_(own_part(state["ema"][name]))
    return step


def snapshot(
    objective: Objective, optimizer: torch.optim.Optimizer, ema: list[Tensor], leads: bool = True
) -> checkpoint.State:
    """What a checkpoint holds, in the CPU's memory: training goes on and changes what it is a copy of.

    Sharded, all processes call it, and the one that leads has it.
    """
    state = {"model": objective.state_dict(), "optimizer": checkpoint.optimizer_state(objective, optimizer)}
    if ema:
        # With what is not averaged, batch norm's counters, so that an encoder can be loaded from this file alone.
        state["ema"] = state["model"] | dict(zip(averaged(objective), ema, strict=True))
    return on_host(state, leads)


def pictures(objective: Objective, batch: Batch) -> dict[str, Tensor]:
    """What the objective shows of some images."""
    with drawing(PICTURE_SEED, 0, batch), called(objective.config.name, "pictures()"), uncompiled():
        shown = objective.pictures(batch)
    let_go(objective)
    for name, row in shown.items():
        if not isinstance(row, Tensor) or row.dtype != torch.uint8 or row.ndim != 4:
            found = f"{row.dtype} of shape {tuple(row.shape)}" if isinstance(row, Tensor) else type(row).__name__
            raise TrainingError(f"{objective.config.name}: pictures() must give uint8 (b, c, h, w), got {name} {found}")
    return shown
