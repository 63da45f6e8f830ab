"""The start of a run: its objective before the first step or before it goes on, and what is settled with it."""

import logging
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mpp import checkpoint
from mpp.data.subset import digest, label_digest
from mpp.differing import quoted
from mpp.errors import UserError, cause
from mpp.execution import Once, choose
from mpp.jsons import encoded
from mpp.loop import steps_of
from mpp.models.decoder import Decoder
from mpp.models.encoder import feed
from mpp.models.encoders import ENCODERS, build_encoder
from mpp.objectives import OBJECTIVES, ObjectiveConfig, build_objective
from mpp.objectives.base import Objective
from mpp.objectives.calls import called
from mpp.ranks import Ranks, here
from mpp.recipe import Recipe, load_recipe, save_recipe
from mpp.recipe.recipe import changes, lasting
from mpp.recipe.settled import FILE, RunError, Settled, load_settled
from mpp.run.finished import FILE as FINISHED
from mpp.run.images import RunImages
from mpp.seeds import seed_of
from mpp.shards.index import Index
from mpp.weights import Start, load_start

INITIAL = -1  # in the place of a step in seeds: what is drawn before training

logger = logging.getLogger("mpp.run")


class Earlier(NamedTuple):
    """A run that has begun."""

    folder: Path
    recipe: Recipe  # as it was asked
    settled: Settled


def earlier(out: Path, *, done: bool = False) -> Earlier | None:
    """The run that a folder goes on with; one that never saved is none to go on with.

    done: whether its results are there already, of which its recipe tells what they are of, saved or not.
    """
    path = out / "recipe.yaml"
    if not done and not checkpoint.steps(out / "checkpoints") and not (out / FINISHED).exists():
        return None
    if not path.exists():
        raise RunError(
            f"{path}: missing, though {out} holds checkpoints; restore it, or choose another folder with out="
        )
    settled = load_settled(out)  # first: the recipe of an earlier version might not be read
    recipe = load_recipe(path)
    try:
        settled.fill(recipe)
    except (ValueError, TypeError) as error:
        raise RunError(f"{out / FILE}: does not go with the recipe.yaml beside it ({cause(error)})") from None
    return Earlier(out, recipe, settled)


def begin(recipe: Recipe, images: RunImages, once: Once) -> tuple[Objective, Settled]:
    """The objective before its first step; writes recipe.yaml, and settled.json beside it."""
    index, epoch = images.batches.index, images.batches.epoch
    settings = with_index(recipe, index).in_steps(epoch)
    given = starting(recipe)
    if given is None and recipe.objective.frozen and here().leads:
        logger.warning("objective.freeze: the encoder that stays as it is has random weights; give --from WEIGHTS")
    objective = build(settings, given)

    def once_a_kind(what: str, choose: Callable[[], Any]) -> Any:
        kind = f" of {settings.model.describe()}, {settings.objective.name}, {recipe.train.batch} images a batch"
        return once(what + kind if what == "micro_batch" else what, choose)

    execution = choose(objective, images.batches, settings.train, once_a_kind)
    check_last_batch(recipe, objective, epoch, execution.micro_batch)
    settled = Settled(
        images=digest(index),
        labels=label_digest(index) if recipe.objective.needs.labels else None,
        weights=None if given is None else given.fingerprint,
        objective=found_settings(recipe.objective, settings.objective),
        steps=steps_of(settings.train),
        warmup=int(settings.train.warmup),
        shuffle=images.shuffle,
        prepare=images.batches.prepared,
        execution=execution,
        imports=imports_of_parts(recipe),
        processes=here().size,
    )
    save_start(recipe, settled)
    return objective, settled


def refuse_leftovers(out: Path, objective: ObjectiveConfig) -> None:
    """RunError if a folder without a checkpoint holds results, which a new run's recipe would claim as its own."""
    names = [f"{name}.safetensors" for name in objective.results]
    if left := [name for name in (*names, "scores.json") if (out / name).exists()]:
        raise RunError(
            f"{out / left[0]}: of a run whose checkpoints are gone, without which it can't go on; delete it, or choose "
            "another folder with out="
        )


def check_same_folder(out: Path, ranks: Ranks) -> None:
    """Raises RunError unless all processes see the same checkpoints, as the folder of a run is one for all of them."""
    found = ranks.gathered(checkpoint.steps(out / "checkpoints"))
    if other := next((rank for rank, steps in enumerate(found) if steps != found[0]), None):
        raise RunError(
            f"{out}: process {other} sees other checkpoints there than process 0; put it on a disk that all see"
        )


def check_shared_epochs(recipe: Recipe, epoch: int, ranks: Ranks) -> None:
    """Raises RunError where an epoch ends with a batch that the processes can't share."""
    if recipe.data.last_batch == "kept" and (left := epoch % recipe.train.batch) % ranks.size:
        raise RunError(
            f"data.last_batch: kept ends an epoch of {epoch} images with a batch of {left}, which {ranks.size} "
            "processes can't share; use chained or dropped"
        )
    if recipe.data.last_batch == "kept" and ranks.size > 1 and recipe.objective.needs.pairs and left // ranks.size % 2:
        raise RunError(
            f"data.last_batch: kept ends an epoch of {epoch} images with a batch of {left}, of which each of "
            f"{ranks.size} processes has {left // ranks.size}, expected an even number: {recipe.objective.name} mixes "
            "each image with its neighbour; use chained or dropped"
        )


def save_start(recipe: Recipe, settled: Settled) -> None:
    """Writes recipe.yaml, and settled.json beside it."""
    if not here().leads:
        return
    save_recipe(recipe, recipe.folder / "recipe.yaml")
    settled.save(recipe.folder)


def found_settings(asked: ObjectiveConfig, settled: ObjectiveConfig) -> dict[str, Any]:
    """The settings of an objective that follow from the images."""
    values = {field.name: getattr(settled, field.name) for field in fields(settled)}
    found = {name: value for name, value in values.items() if value != getattr(asked, name)}
    try:
        encoded(found)
    except (TypeError, ValueError) as error:
        raise RunError(f"objective.name {asked.name}: settled() gave what no file can hold: {cause(error)}") from None
    return found


def go_on(before: Earlier, recipe: Recipe, images: RunImages) -> tuple[Objective, Settled]:
    """The objective of a run that has begun, whose checkpoint the loop puts back; RunError if it is another run."""
    return build(same_run(before, recipe, images), same_weights(before, recipe)), with_threads(before.settled, recipe)


def with_threads(settled: Settled, recipe: Recipe) -> Settled:
    """As settled, but with threads anew where another number of processes goes on: sums have another order by that
    anyway, and a machine's cores are shared by so many."""
    if here().size == settled.processes:
        return settled
    threads = recipe.train.threads or here().shared(torch.get_num_threads)
    return replace(settled, execution=replace(settled.execution, threads=threads))


def same_run(before: Earlier, recipe: Recipe, images: RunImages) -> Recipe:
    """The recipe with what follows from its images; RunError unless it and they are those that a run began with."""
    folder, settled = before.folder, before.settled
    settings = with_index(recipe, images.batches.index).in_steps(images.batches.epoch)
    there, now = settled.fill(before.recipe), settled.for_machine(settings)
    if here().size != settled.processes:
        there = replace(there, train=replace(there.train, threads=now.train.threads))
    if changed := changes(there, now):
        can_go_on = not (lasting(changed, settings) or (folder / FINISHED).exists())
        onward = f", there with --continue {folder} to go on from this one's state" if can_go_on else ""
        raise RunError(
            f"{folder}: holds a run of another recipe ({'; '.join(changed)}); choose another folder with out={onward}"
        )
    if found := other_images(settled, images.batches.index):
        raise RunError(
            f"{folder}: holds a run on other images ({found}); restore them, or choose another folder with out="
        )
    return settings


def other_images(settled: Settled, index: Index) -> str | None:
    """What tells these from the images and labels that a run began with, wherever they lie now; None if nothing."""
    if (found := digest(index)) != settled.images:
        return f"it began with {settled.images}, now there are {found}"
    if settled.labels not in (None, label_digest(index)):
        return f"{settled.images} as it began with, but with other labels"
    return None


def same_weights(before: Earlier, recipe: Recipe) -> Start | None:
    """The weights that a run began with, if they are still there: its checkpoints hold all that it needs of them.

    Raises RunError if others are there now, or if they are gone and no checkpoint is whole.
    """
    folder, digest = before.folder, before.settled.weights
    if (recipe.weights is None) != (digest is None):
        there, here = (quoted(one.weights) for one in (before.recipe, recipe))
        raise RunError(f"{folder}: holds a run that began from weights {there}, here {here}; choose another with out=")
    if recipe.weights is None:
        return None
    if not Path(recipe.weights).exists() and recipe.weights == before.recipe.weights:
        if (folder / FINISHED).exists() or not checkpoint.steps(folder / "checkpoints"):
            return None  # it is done
        if checkpoint.load_latest(folder / "checkpoints") is None:
            raise RunError(f"{recipe.weights}: gone, and {folder} holds no whole checkpoint to go on from; restore it")
        logger.info("%s: gone; the run goes on from its checkpoint, which holds all that it needs", recipe.weights)
        return None
    given = starting(recipe)
    if given is None or given.fingerprint != digest:
        raise RunError(
            f"{folder}: holds a run that began from other weights than {recipe.weights} now holds; "
            "restore them, or choose another folder with out="
        )
    return given


def with_index(recipe: Recipe, index: Index) -> Recipe:
    """The recipe with the settings of its objective that follow from the images to train on."""
    try:
        return replace(recipe, objective=recipe.objective.settled(index))
    except UserError:
        raise
    except ValueError as error:
        raise RunError(str(error)) from error


def starting(recipe: Recipe) -> Start | None:
    """What a recipe starts from, if it names weights."""
    return load_start(recipe.weights, decoder=recipe.objective.takes_decoder) if recipe.weights else None


def build(recipe: Recipe, given: Start | None = None) -> Objective:
    """The recipe's objective at its start: random weights depend on the recipe's seed alone.

    given: what it starts from. The encoder has its weights before the objective is made, so that teachers have too.
    """
    torch.manual_seed(seed_of(recipe.seed, INITIAL))
    encoder = build_encoder(recipe.model)
    if given is not None:
        try:
            encoder.adopt(given.encoder)
        except ValueError as error:
            raise RunError(f"{recipe.weights}: another encoder than the recipe's: {error}") from None
    with called(recipe.objective.name, "its constructor", ValueError):
        objective = build_objective(encoder, recipe.objective)
    if given is not None and given.decoder is not None:
        assert isinstance(objective.decoder, Decoder), "as `takes_decoder` says"
        given.decoder.fill(objective.decoder)
    feed(objective, recipe.data.augment.input(recipe.model.image))
    return objective


def at_start(recipe: Recipe) -> Objective:
    """The objective of a recipe as it is before any step, its starting weights loaded."""
    return build(recipe, starting(recipe))


def imports_of_parts(recipe: Recipe) -> dict[str, str]:
    """By which imports the recipe has parts that are not mpp's."""
    origins = {
        "objective.name": OBJECTIVES.origin(recipe.objective.name),
        "model.name": ENCODERS.origin(recipe.model.name),
    }
    return {key: origin for key, origin in origins.items() if origin is not None}


def check_last_batch(recipe: Recipe, objective: Objective, epoch: int, micro_batch: int) -> None:
    """Raises RunError where batch norm, or an objective that compares images, would get a single one."""
    across = objective.encoder.looks_across_batch or objective.needs.whole_batch
    if recipe.data.last_batch == "kept" and across and epoch % recipe.train.batch % micro_batch == 1:
        what = "batch norm" if objective.encoder.looks_across_batch else f"objective.name {recipe.objective.name}"
        raise RunError(
            f"data.last_batch: kept ends an epoch of {epoch} images with a batch of 1, which {what} cannot take; "
            "use chained or dropped, or another train.batch"
        )
