"""A run: from a recipe to a folder with metrics, checkpoints and an encoder; started again there, it goes on."""

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from mpp import checkpoint
from mpp.data.index import UNFINISHED, ShardError, splits
from mpp.data.read import Batches, read_shards
from mpp.data.write import make_shards
from mpp.errors import UserError
from mpp.files import claimed
from mpp.hardware import device_of
from mpp.loop import forward_pass, settled, train
from mpp.objectives import Objective
from mpp.recipe import Recipe, differences, load_recipe, save_recipe
from mpp.seeds import seed_of
from mpp.weights import load_encoder, save_encoder

INITIAL = -1  # in the place of a step in seeds: what is drawn before training
EVALUATION = -2


class RunError(UserError):
    """A run can't start where it was asked to."""


def pretrain(recipe: Recipe) -> Path:
    """Runs a recipe to its end, or on from where it stopped; gives the run folder."""
    out = recipe.folder
    with claimed(out, "in use by a run that is still going; stop it, or choose another folder with out="):
        batches = open_split(recipe, recipe.data.train, recipe.train.batch)
        recipe = recipe.in_steps(len(batches.index))
        objective = build(recipe)
        recipe = same_as_before(recipe, objective, batches, out)
        train(
            objective,
            batches,
            recipe.train,
            out=out,
            seed=recipe.seed,
            log=recipe.log,
            evaluate=evaluation(recipe, objective) if recipe.data.val else None,
            evaluate_every=recipe.eval.every,
        )
        save_encoder(objective.encoder, out / "encoder.safetensors")
    return out


def open_split(recipe: Recipe, split: str, batch: int, *, training: bool = True) -> Batches:
    """Opens a split of the recipe's shards; makes them first if the recipe says from what and they are not there."""
    data, folder = recipe.data, Path(recipe.data.path)
    if data.source and (not splits(folder) or (folder / UNFINISHED).exists()):
        make_shards(data.source, folder)
    batches = read_shards(
        data.path,
        batch,
        split=split,
        image=recipe.model.image,
        seed=recipe.seed,
        train=training,
        augment=data.augment,
        reader=data.reader,
        memory=data.memory,
        threads=data.threads,
    )
    channels = 1 if batches.index.mode == "L" else 3
    if channels != recipe.model.channels:
        raise ShardError(f"{data.path}: images have {channels} channels, model.channels is {recipe.model.channels}")
    return batches


def build(recipe: Recipe) -> Objective:
    """The recipe's objective around its encoder, at its start: random weights depend on the recipe's seed alone."""
    torch.manual_seed(seed_of(recipe.seed, INITIAL))
    objective = recipe.build()
    if recipe.weights:
        given = load_encoder(recipe.weights)
        there, here = asdict(given.config), asdict(recipe.model)
        changed = [f"{key} {there[key]} there, {here[key]} in the recipe" for key in here if there[key] != here[key]]
        if changed:
            raise RunError(f"{recipe.weights}: another encoder than the recipe's (model: {'; '.join(changed)})")
        objective.encoder.load_state_dict(given.state_dict())
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
    chosen = {
        key: getattr(before.train, key)
        for key in ("precision", "compile", "threads", "micro_batch")
        if getattr(recipe.train, key) in ("auto", None)
    }
    recipe = replace(recipe, train=replace(recipe.train, **chosen))
    free = ("out", "log.", "data.threads", "data.reader", "data.memory", "train.save_every", "train.keep")
    changed = [line for line in differences(before, recipe) if not line.startswith(free)]
    if changed:
        raise RunError(f"{out}: holds a run of another recipe ({'; '.join(changed)}); choose another folder with out=")
    return recipe


def evaluation(recipe: Recipe, objective: Objective) -> Callable[[], dict[str, float]]:
    """A function that scores the objective on `data.val`: the means over its images, for the same draws every time."""
    assert recipe.data.val is not None
    assert isinstance(recipe.train.micro_batch, int), "settled() comes first"
    batch = min(recipe.train.micro_batch, recipe.eval.images)  # fits in memory, and is compiled already
    batches = open_split(recipe, recipe.data.val, batch, training=False)
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
