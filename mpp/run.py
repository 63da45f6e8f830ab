"""A run: from a recipe to a folder with metrics, checkpoints and an encoder; started again there, it goes on."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from mpp import checkpoint
from mpp.data.index import UNFINISHED, Index, ShardError, read_index, splits
from mpp.data.read import Batches, read_shards
from mpp.data.subset import SubsetConfig, drawn, lacking
from mpp.data.write import make_shards
from mpp.errors import UserError, shown
from mpp.files import claimed
from mpp.hardware import device_of
from mpp.loop import forward_pass, settled, train
from mpp.objectives import Objective
from mpp.objectives.labels import Classification, LabelsConfig
from mpp.recipe import Recipe, differences, load_recipe, save_recipe
from mpp.seeds import seed_of
from mpp.weights import load_encoder, save_classifier, save_encoder

INITIAL = -1  # in the place of a step in seeds: what is drawn before training
EVALUATION = -2


class RunError(UserError):
    """A run can't start where it was asked to."""


def run(recipe: Recipe) -> Path:
    """Carries out a recipe to its end, or on from where it stopped; gives the run folder."""
    out = recipe.folder
    with claimed(out, "in use by a run that is still going; stop it, or choose another folder with out="):
        batches = open_train(recipe)
        recipe = resolved(recipe, batches.index)
        part = scored_part(recipe)
        if isinstance(recipe.objective, LabelsConfig) and recipe.data.val:
            check_classes(batches.index, read_index(recipe.data.path, recipe.data.val))
        objective = build(recipe)
        recipe = same_as_before(recipe, objective, batches, out)
        train(
            objective,
            batches,
            recipe.train,
            out=out,
            seed=recipe.seed,
            log=recipe.log,
            evaluate=evaluation(recipe, objective, *part) if part else None,
            evaluate_every=recipe.eval.every,
        )
        if isinstance(objective, Classification):
            save_classifier(objective.classifier, out / "classifier.safetensors")
        save_encoder(objective.encoder, out / "encoder.safetensors")
    return out


def open_train(recipe: Recipe) -> Batches:
    """The images to train on; makes the shards first if the recipe says from what and they are not there."""
    data, folder = recipe.data, Path(recipe.data.path)
    if data.source and (not splits(folder) or (folder / UNFINISHED).exists()):
        make_shards(data.source, folder)
    return _open(recipe, data.train, recipe.train.batch, parts(recipe)[0], train=True)


def scored_part(recipe: Recipe) -> tuple[str, np.ndarray | None] | None:
    """What the objective is scored on while training: a split and the numbers of its images (None for all).

    The images held out from training if there are any, or else `data.val`.
    """
    data, (_, held) = recipe.data, parts(recipe)
    if held is not None and len(held):
        return data.train, held
    if data.val is None:
        return None
    if isinstance(recipe.objective, LabelsConfig):
        return data.val, drawn(read_index(data.path, data.val), SubsetConfig(), recipe.seed)[0]
    return data.val, None


def parts(recipe: Recipe) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Numbers of the images to train on and to hold out; None for all and none."""
    if recipe.data.subset == SubsetConfig() and not isinstance(recipe.objective, LabelsConfig):
        return None, None
    return drawn(read_index(recipe.data.path, recipe.data.train), recipe.data.subset, recipe.seed)


def _open(recipe: Recipe, split: str, batch: int, numbers: np.ndarray | None, *, train: bool) -> Batches:
    data = recipe.data
    batches = read_shards(
        data.path,
        batch,
        split=split,
        image=recipe.model.image,
        seed=recipe.seed,
        train=train,
        augment=data.augment,
        reader=data.reader,
        memory=data.memory,
        threads=data.threads,
        numbers=numbers,
    )
    channels = 1 if batches.index.mode == "L" else 3
    if channels != recipe.model.channels:
        raise ShardError(f"{data.path}: images have {channels} channels, model.channels is {recipe.model.channels}")
    return batches


def resolved(recipe: Recipe, index: Index) -> Recipe:
    """The recipe with what follows from the images to train on: steps, and with labels classes and their weights."""
    recipe = recipe.in_steps(len(index))
    objective = recipe.objective
    if not isinstance(objective, LabelsConfig):
        return recipe
    if objective.classes and objective.classes != index.classes:
        raise RunError(
            f"{recipe.data.path}: has {len(index.classes)} classes ({', '.join(index.classes)[:60]}), "
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
            f"{scored.folder}: split {scored.split} has images of class {', '.join(map(shown, names[:3]))}{more}, "
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


def same_as_before(recipe: Recipe, objective: Objective, batches: Batches, out: Path) -> Recipe:
    """The recipe with all that is left to the machine chosen: at the first start by measuring, later as it was then.

    Raises RunError if the folder belongs to another recipe.
    """
    path = out / "recipe.yaml"
    if not path.exists() or not checkpoint.steps(out / "checkpoints"):  # a run that never saved is none to go on with
        recipe = replace(recipe, train=settled(objective, batches, recipe.train))
        save_recipe(recipe, path)
        return recipe
    before = load_recipe(path)
    recipe = as_chosen(before, recipe)
    if changed := changes(before, recipe):
        raise RunError(f"{out}: holds a run of another recipe ({'; '.join(changed)}); choose another folder with out=")
    return recipe


def as_chosen(before: Recipe, recipe: Recipe) -> Recipe:
    """The recipe with what it leaves to the machine as an earlier start chose it."""
    chosen = {
        key: getattr(before.train, key)
        for key in ("precision", "compile", "threads", "micro_batch")
        if getattr(recipe.train, key) in ("auto", None)
    }
    return replace(recipe, train=replace(recipe.train, **chosen))


def changes(before: Recipe, recipe: Recipe) -> list[str]:
    """What differs between two recipes that decides a run's results, a line each."""
    free = ("out", "log.", "data.threads", "data.reader", "data.memory", "train.save_every", "train.keep")
    return [line for line in differences(before, recipe) if not line.startswith(free)]


def evaluation(
    recipe: Recipe, objective: Objective, split: str, numbers: np.ndarray | None
) -> Callable[[], dict[str, float]]:
    """A function that scores the objective on part of a split: means over its images, for the same draws every time."""
    assert isinstance(recipe.train.micro_batch, int), "settled() comes first"
    size = min(recipe.train.micro_batch, recipe.eval.images)  # fits in memory, and is compiled already
    batches = _open(recipe, split, size, numbers, train=False)
    device, forward = device_of(recipe.train.device), forward_pass(objective, replace(recipe.train, compile=False))

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        objective.eval()
        totals: dict[str, float] = {}
        images = 0
        for step in range(min(len(batches), math.ceil(recipe.eval.images / batches.batch))):
            torch.manual_seed(seed_of(recipe.seed, EVALUATION, step))
            batch = batches.at(step).to(device)
            if not len(batch):
                continue  # all of its images are damaged
            loss, metrics = forward(batch)
            for name, value in {"loss": loss, **metrics}.items():
                totals[f"val/{name}"] = totals.get(f"val/{name}", 0.0) + value.item() * len(batch)
            images += len(batch)
        objective.train()
        return {name: total / images for name, total in totals.items()}

    return evaluate
