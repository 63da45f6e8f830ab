"""A run: from a recipe to a folder with metrics, checkpoints and an encoder; started again there, it goes on."""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from mpp import checkpoint
from mpp.data.batches import Batches, faster
from mpp.data.chosen import chosen
from mpp.data.config import ShuffleName
from mpp.data.read import open_batches, windowed
from mpp.data.subset import digest, lacking
from mpp.errors import UserError, shown
from mpp.files import claimed
from mpp.hardware import device_of
from mpp.loop import forward_pass, settled, train
from mpp.objectives import Objective
from mpp.objectives.labels import Classification, LabelsConfig
from mpp.recipe import Recipe, differences, load_recipe, save_recipe
from mpp.remote.urls import is_url
from mpp.seeds import seed_of
from mpp.shards.index import UNFINISHED, Index, ShardError, splits
from mpp.shards.write import make_shards
from mpp.weights import load_encoder, save_classifier, save_encoder

INITIAL = -1  # in the place of a step in seeds: what is drawn before training
EVALUATION = -2


class RunError(UserError):
    """A run can't start where it was asked to."""


def run(recipe: Recipe) -> Path:
    """Carries out a recipe to its end, or on from where it stopped; gives the run folder."""
    out = recipe.folder
    busy = "in use by a run that is still going; stop it, or choose another folder with out="
    with claimed(out, busy), ExitStack() as stack:
        if (before := earlier(out)) is not None:
            recipe = as_chosen(before, recipe)
        recipe, batches, scored = opened(recipe)
        stack.callback(batches.close)
        recipe = resolved(recipe, batches.index, batches.epoch)
        if isinstance(recipe.objective, LabelsConfig) and scored is not None:
            check_classes(batches.index, scored)
        objective = build(recipe)
        recipe = settle(recipe, before, objective, batches)
        evaluate = None
        if scored is not None:
            images = _open(recipe, [scored], evaluation_batch(recipe), train=False)
            stack.callback(images.close)
            evaluate = evaluation(recipe, objective, images)
        train(
            objective,
            batches,
            recipe.train,
            out=out,
            seed=recipe.seed,
            log=recipe.log,
            evaluate=evaluate,
            evaluate_every=recipe.eval.every,
        )
        if isinstance(objective, Classification):
            save_classifier(objective.classifier, out / "classifier.safetensors")
        save_encoder(objective.encoder, out / "encoder.safetensors")
    return out


def opened(recipe: Recipe) -> tuple[Recipe, Batches, Index | None]:
    """The batches to train on and the images to score on; makes the shards first if the recipe says from what.

    The recipe comes back with a plain value for whatever its `data` section leaves to the machine.
    """
    data = recipe.data
    if data.source and not is_url(data.path):
        folder = Path(data.path)
        if not splits(folder) or (folder / UNFINISHED).exists():
            make_shards(data.source, folder)
    train, scored = chosen(data, recipe.seed, isinstance(recipe.objective, LabelsConfig))
    batches = _open(recipe, train, recipe.train.batch, train=True)
    shuffle: ShuffleName = "window" if windowed(batches.index, data) else "all"
    return replace(recipe, data=replace(data, shuffle=shuffle, prepare=batches.prepared)), batches, scored


def _open(recipe: Recipe, indexes: Sequence[Index], batch: int, *, train: bool) -> Batches:
    """Batches, prepared on the CPU or the device as the recipe says or, if it leaves that open, as is faster."""
    found, expected = indexes[0].channels, recipe.model.channels
    if found != expected:
        raise ShardError(f"{indexes[0].origin}: images have {found} channels, model.channels is {expected}")
    data, device, image = recipe.data, device_of(recipe.train.device), recipe.model.image
    on_cpu = partial(open_batches, indexes, batch, data, image=image, seed=recipe.seed, train=train)
    if data.prepare == "cpu" or (data.prepare == "auto" and device.type != "cuda"):
        return on_cpu()
    there = on_cpu(device=device)
    return there if data.prepare == "device" or there.stored else faster(on_cpu(), there)


def resolved(recipe: Recipe, index: Index, epoch: int) -> Recipe:
    """The recipe with what follows from the images to train on: steps, and with labels classes and their weights."""
    found = digest(index)
    if recipe.data.found not in (None, found):
        raise RunError(f"{index.origin}: holds {found}, data.found is {recipe.data.found}: these are other images")
    recipe = replace(recipe.in_steps(epoch), data=replace(recipe.data, found=found))
    objective = recipe.objective
    if not isinstance(objective, LabelsConfig):
        return recipe
    if objective.classes and objective.classes != index.classes:
        raise RunError(
            f"{index.origin}: has {len(index.classes)} classes ({', '.join(index.classes)[:60]}), "
            f"objective.classes are {len(objective.classes)} ({', '.join(objective.classes)[:60]})"
        )
    weights = objective.weights
    if weights and len(weights) != len(index.classes):
        raise RunError(f"objective.weights needs {len(index.classes)} numbers, one a class, got {len(weights)}")
    if objective.balance and not weights:
        counts = np.bincount(index.label, minlength=len(index.classes))
        weights = tuple(round(float(len(index) / count), 6) if count else 0.0 for count in counts)
    return replace(recipe, objective=replace(objective, classes=index.classes, weights=weights))


def check_classes(train: Index, scored: Index) -> None:
    """Raises ShardError for a class that is scored and that no image to train on has."""
    if names := lacking(train, scored):
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ShardError(
            f"{scored.origin}: split {scored.split} has images of class {', '.join(map(shown, names[:3]))}{more}, "
            f"of which split {train.split} has none to train on"
        )


def build(recipe: Recipe) -> Objective:
    """The recipe's objective around its encoder, at its start: random weights depend on the recipe's seed alone."""
    torch.manual_seed(seed_of(recipe.seed, INITIAL))
    objective = recipe.build()
    if recipe.weights:
        given = load_encoder(recipe.weights)
        try:
            objective.encoder.adopt(given)
        except ValueError as error:
            raise RunError(f"{recipe.weights}: another encoder than the recipe's: {error}") from None
    return objective


def earlier(out: Path) -> Recipe | None:
    """The recipe that a run folder goes on with; a run that never saved is none to go on with."""
    path = out / "recipe.yaml"
    return load_recipe(path) if path.exists() and checkpoint.steps(out / "checkpoints") else None


def settle(recipe: Recipe, before: Recipe | None, objective: Objective, batches: Batches) -> Recipe:
    """The recipe with all that is left to the machine chosen: at the first start by measuring, later as it was then.

    Raises RunError if the folder belongs to another recipe.
    """
    out = recipe.folder
    if before is None:
        recipe = replace(recipe, train=settled(objective, batches, recipe.train))
        _check_last_batch(recipe, objective, batches.epoch)
        save_recipe(recipe, out / "recipe.yaml")
        return recipe
    if changed := changes(before, recipe):
        raise RunError(f"{out}: holds a run of another recipe ({'; '.join(changed)}); choose another folder with out=")
    if before.data.found != recipe.data.found:
        found = f"it began with {before.data.found}, now there are {recipe.data.found}"
        raise RunError(
            f"{out}: holds a run on other images ({found}); restore them, or choose another folder with out="
        )
    return recipe


def _check_last_batch(recipe: Recipe, objective: Objective, epoch: int) -> None:
    """Raises RunError where batch norm would get a single image."""
    batch, micro = recipe.train.batch, recipe.train.micro_batch
    assert isinstance(micro, int), "settled() comes first"
    kept = recipe.data.last_batch == "kept" and objective.encoder.looks_across_batch
    if kept and epoch % batch % micro == 1:
        raise RunError(
            f"data.last_batch: kept ends an epoch of {epoch} images with a batch of 1, which batch norm cannot take; "
            "use chained or dropped, or another train.batch"
        )


def as_chosen(before: Recipe, recipe: Recipe) -> Recipe:
    """The recipe with what it leaves to the machine as an earlier start chose it."""
    chosen = {
        key: getattr(before.train, key)
        for key in ("precision", "compile", "threads", "micro_batch")
        if getattr(recipe.train, key) in ("auto", None)
    }
    prepare = before.data.prepare if recipe.data.prepare == "auto" else recipe.data.prepare
    return replace(recipe, train=replace(recipe.train, **chosen), data=replace(recipe.data, prepare=prepare))


def changes(before: Recipe, recipe: Recipe) -> list[str]:
    """What differs between two recipes that decides a run's results, a line each."""
    reading = ("threads", "reader", "memory", "cache", "allow", "found")  # of `found` more is said elsewhere
    free = ("out", "log.", "train.save_every", "train.keep", *(f"data.{name}" for name in reading))
    return [line for line in differences(before, recipe) if not line.startswith(free)]


def evaluation_batch(recipe: Recipe) -> int:
    """Images of a batch that fits in memory, and is compiled already."""
    assert isinstance(recipe.train.micro_batch, int), "settle() comes first"
    return min(recipe.train.micro_batch, recipe.eval.images)


def evaluation(recipe: Recipe, objective: Objective, batches: Batches) -> Callable[[Sequence[int]], dict[str, float]]:
    """A function that scores the objective on images: means over them, for the same draws every time.

    It gives nothing if it is asked to stop before.
    """
    device, forward = device_of(recipe.train.device), forward_pass(objective, replace(recipe.train, compile=False))

    @torch.no_grad()
    def evaluate(stop: Sequence[int]) -> dict[str, float]:
        objective.eval()
        totals: dict[str, float] = {}
        images, steps = 0, min(len(batches), math.ceil(recipe.eval.images / batches.batch))
        for step, batch in zip(range(steps), batches.iterate(0, stop), strict=False):
            if stop:
                break
            if not len(batch):
                continue  # all of its images are damaged
            torch.manual_seed(seed_of(recipe.seed, EVALUATION, step))
            loss, metrics = forward(batch.to(device))
            for name, value in {"loss": loss, **metrics}.items():
                totals[f"val/{name}"] = totals.get(f"val/{name}", 0.0) + value.item() * len(batch)
            images += len(batch)
        objective.train()
        if stop:
            return {}
        if not images:
            raise ShardError(f"{batches.index.origin}: every image to score on is damaged")
        return {name: total / images for name, total in totals.items()}

    return evaluate
