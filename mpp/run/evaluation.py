"""Scoring the objective while it trains, on images that it does not train on."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from mpp.batch import Batch
from mpp.execution import drawing, forward_pass
from mpp.hardware import device_of
from mpp.objectives.base import Objective
from mpp.objectives.calls import called
from mpp.objectives.config import in_units
from mpp.ranks import here
from mpp.recipe import Recipe
from mpp.run.images import RunImages
from mpp.run.neighbours import Neighbours
from mpp.shards.index import ShardError
from mpp.split import is_sharded
from mpp.train_config import Execution
from mpp.watch import REMEDIES, TrainingError

EVALUATION = -2  # in the place of a step in seeds


def evaluation(
    recipe: Recipe, objective: Objective, images: RunImages, execution: Execution
) -> Callable[[Sequence[int]], dict[str, float]] | None:
    """A function that scores the objective: means over the images, for the same draws every time.

    Where the recipe asks for it `val/knn` is beside them: how often the nearest of some labelled images to train on
    tell the class (mpp/run/neighbours.py). It gives nothing if it is asked to stop before. Raises TrainingError if the
    loss is not finite: whatever else was scored is worth nothing then. None where the recipe names no images to score
    on.
    """
    ranks = here()
    # A batch that fits in memory. Not compiled: another graph, and one more for its last part, take longer to make.
    across = objective.needs.whole_batch
    at_once = min(execution.micro_batch * (1 if across else ranks.size), recipe.eval.images)
    batches, known = images.open_scored(at_once), images.open_known(at_once)
    if batches is None:
        return None
    device = device_of(recipe.train.device)
    neighbours = Neighbours(objective, batches, known, execution, device) if known else None
    forward = forward_pass(objective, recipe.train, replace(execution, compile=False))

    @torch.no_grad()
    def evaluate(stop: Sequence[int]) -> dict[str, float]:
        objective.eval()
        figures = scored(stop)
        objective.train()
        return figures

    def scored(stop: Sequence[int]) -> dict[str, float]:
        totals: dict[str, tuple[float, int]] = {}  # of each figure the sum, and of how many images
        queries: list[Batch] = []
        read, turn = batches.iterate(0, stop), ranks.turn(stop, ())
        for step in range(len(batches)):
            batch = next(read, None)
            turn = ranks.turn(stop, batch)
            if batch is None or turn.ended or turn.stop:
                break
            batch = ranks.joined(batch) if across else batch
            own = len(batch)  # 0 where all of its images are damaged, or other processes have them
            if not turn.images or not (own or is_sharded(objective) or neighbours):
                continue
            if not own:  # the others need this process's part of the weights, or wait for its vectors
                batch = batch.blank(2)  # pairs, and norms that refuse a single value
            batch = replace(batch, places=step * batches.batch + batch.whole_places).to(device)
            with drawing(recipe.seed, EVALUATION, batch, step), called(objective.config.name, "forward()"):
                loss, metrics = forward(batch)
                for name, value in {"loss": loss, **metrics}.items() if own else ():
                    total, of = totals.get(name, (0.0, 0))
                    totals[name] = total + float(value) * own, of + own
            if neighbours:
                queries.append(neighbours.vectors(batch, own, across))
        if turn.ended or turn.stop or (ranks.size == 1 and stop):
            return {}
        means = mean_of(ranks.gathered(totals))
        if not means:
            raise ShardError(f"{batches.index.origin}: every image to score on is damaged")
        if not math.isfinite(means["loss"]):
            raise TrainingError(
                f"the loss on split {batches.index.split} is {means['loss']:g}, though that of training is "
                f"finite; checkpoints are from before. {REMEDIES.format(lr=recipe.train.lr)}"
            )
        figures = {f"val/{name}": value for name, value in in_units(objective.config.metrics, means).items()}
        if neighbours:
            near = neighbours.score(queries, stop)
            return {} if near is None else {**figures, "val/knn": near}
        return figures

    return evaluate


def mean_of(parts: Iterable[Any]) -> dict[str, float]:
    """The means of figures, of which each process has sums and of how many images these are."""
    totals: dict[str, tuple[float, int]] = {}
    for figures in parts:
        for name, (value, of) in figures.items():
            total, images = totals.get(name, (0.0, 0))
            totals[name] = total + value, images + of
    return {name: total / images for name, (total, images) in totals.items()}
