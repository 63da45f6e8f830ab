"""A run that goes on from the whole state of another one: made longer, or with another rate.

Its folder is one of its own, with a recipe of its own that names the other run; settled.json says which state it was.
The state is copied there as its first checkpoint, in which it has what any interrupted run has.
"""

import hashlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

from mpp import checkpoint, jsons
from mpp.checks import facts_of_result
from mpp.data.config import position_of, step_from
from mpp.execution import Once, choose
from mpp.loop import build_optimizer, kept_steps, rate_at, steps_of
from mpp.objectives.base import Objective
from mpp.ranks import here
from mpp.recipe import Recipe
from mpp.recipe.recipe import BY_CONTENT, changes, computed, lasting
from mpp.recipe.settled import Continued, RunError, Settled
from mpp.run.finished import FILE as FINISHED
from mpp.run.images import RunImages
from mpp.run.start import (
    Earlier,
    build,
    check_last_batch,
    earlier,
    found_settings,
    imports_of_parts,
    other_images,
    save_start,
    with_index,
)  # fmt: skip

logger = logging.getLogger("mpp.run")


class Source(NamedTuple):
    """A run whose state another one goes on from."""

    run: Earlier
    step: int | None = None  # of the checkpoint that was named; None: to be chosen

    @property
    def folder(self) -> Path:
        return self.run.folder

    @property
    def recipe(self) -> Recipe:
        """In plain values, as it was carried out."""
        return self.run.settled.fill(self.run.recipe)

    @property
    def identity(self) -> str:
        """A digest of what the run computes: of its recipe, images, labels and starting weights, wherever they lie."""
        settled = self.run.settled
        content = [settled.images, settled.labels, settled.weights, settled.continued and settled.continued.state]
        values = {key: value for key, value in computed(self.recipe).items() if key not in BY_CONTENT}
        return hashlib.sha256(jsons.text([content, values], sort_keys=True, default=str).encode()).hexdigest()[:32]

    def chosen(self, recipe: Recipe) -> Recipe:
        """A recipe in which what is left to the machine is as this run chose it, but for the parts of another batch."""
        parts = recipe.train.micro_batch
        if recipe.train.batch == self.recipe.train.batch or parts != "auto":
            return self.run.settled.for_machine(recipe)
        filled = self.run.settled.for_machine(_split(recipe, recipe.train.batch))
        return _split(filled, "auto")

    def checkpoint(self, step: int) -> Path:
        return self.folder / f"checkpoints/step-{step:08d}"


def open_source(path: str) -> Source:
    """The run that a recipe's `continues` names, by its folder or one of its checkpoints; RunError if it can't be."""
    place, step = Path(path), None
    if place.parent.name == "checkpoints" and place.name.startswith("step-"):
        if not place.is_dir():
            found = ", ".join(f"step-{step:08d}" for step in checkpoint.steps(place.parent)) or "none"
            raise RunError(f"{place}: no such checkpoint; {place.parent} holds {found}")
        number = place.name.removeprefix("step-")
        if not number.isdecimal() or place.name != f"step-{int(number):08d}":
            raise RunError(f"{path}: is no name of a checkpoint, such as step-00000400; name it so where it is a copy")
        step, place = int(number), place.parent.parent
    if not place.is_dir():
        raise RunError(f"{path}: no such folder; expected that of a run, or a checkpoint in it, to go on from")
    if (place / FINISHED).exists():
        raise RunError(
            f"{place}: its checkpoints were deleted at its end (train.keep_state: false), and they alone held the "
            f"optimizer and all that is no result; --from {place} starts anew from its encoder"
        )
    run = earlier(place)
    if run is None:
        raise RunError(f"{place}: holds no checkpoint of a run to go on from; a file of weights is for --from")
    return Source(run, step)


def go_on_from(source: Source, asked: Recipe, images: RunImages, once: Once) -> tuple[Objective, Settled]:
    """The objective of a run that goes on from another one's state, which is written as the run's first checkpoint.

    asked: the recipe as it was given. RunError, one line, if it can't go on from there.
    """
    index, epoch = images.batches.index, images.batches.epoch
    settings = source.chosen(with_index(asked, index).in_steps(epoch))
    if lines := lasting(changes(source.recipe, settings), settings):
        raise RunError(f"{source.folder}: a run can't go on from it with another {'; '.join(lines[:4])}")
    if found := other_images(source.run.settled, index):
        raise RunError(f"{source.folder}: a run can't go on from it with other images or labels ({found})")
    step, at, state = _state(source, settings, epoch)
    objective = build(settings)
    execution = choose(objective, images.batches, settings.train, once)
    check_last_batch(asked, objective, epoch, execution.micro_batch)
    checkpoint.restore(objective, build_optimizer(objective, settings.train), state)  # refuses what does not fit
    said = [*_average(settings, state), *_rate(source, settings, step, at)]
    logger.info("%s", "; ".join([f"goes on from {source.folder} at its step {step}, here {at}", *said]))
    settled = Settled(
        images=source.run.settled.images,
        labels=source.run.settled.labels,
        weights=None,  # they come with the state
        objective=found_settings(asked.objective, settings.objective),
        steps=steps_of(settings.train),
        warmup=int(settings.train.warmup),
        shuffle=images.shuffle,
        prepare=images.batches.prepared,
        execution=execution,
        imports=imports_of_parts(asked),
        continued=Continued(step, at, checkpoint.digest(source.checkpoint(step)), source.identity),
        processes=here().size,
    )
    save_start(asked, settled)
    described = {"encoder": jsons.text(facts_of_result(objective))}
    kept = kept_steps(settings.train)
    if here().leads:
        checkpoint.save(asked.folder / "checkpoints", at, state, described, settings.train.keep, kept)
    return build(settings), settled


def same_source(before: Earlier, recipe: Recipe) -> None:
    """RunError unless a run that has begun goes on from what it went on from then, if that is still there.

    Its own checkpoints hold all that it needs of it.
    """
    continued, path = before.settled.continued, recipe.continues
    if (path is None) != (continued is None):
        there, here = (f"from {one.continues}" if one.continues else "from none" for one in (before.recipe, recipe))
        raise RunError(
            f"{before.folder}: holds a run that goes on {there}, here {here}; choose another folder with out="
        )
    if path is None or continued is None or (path == before.recipe.continues and not Path(path).exists()):
        return
    folder = Path(path).parent.parent if Path(path).parent.name == "checkpoints" else Path(path)
    run = earlier(folder)
    saved = folder / f"checkpoints/step-{continued.step:08d}"
    if (
        run is None
        or Source(run).identity != continued.run
        or (saved.exists() and checkpoint.digest(saved) != continued.state)
    ):
        raise RunError(
            f"{before.folder}: holds a run that went on from another state than {path} holds; restore that, or choose "
            "another folder with out="
        )


def _split(recipe: Recipe, micro_batch: int | Literal["auto"]) -> Recipe:
    return replace(recipe, train=replace(recipe.train, micro_batch=micro_batch))


def _state(source: Source, settings: Recipe, epoch: int) -> tuple[int, int, checkpoint.State]:
    """The state to go on from: its step there, the same place in the data in steps of the new run, and the tensors.

    That is the newest whole one before the rate falls in either schedule, if they have a constant phase; else the
    newest in the constant phase of the old one; else the newest.
    """
    there, here = source.recipe, settings
    steps = checkpoint.steps(source.folder / "checkpoints") if source.step is None else [source.step]
    places = {}
    for step in steps:
        position = position_of(step, epoch, there.train.batch, there.data.last_batch)
        places[step] = step_from(position, epoch, here.train.batch, here.data.last_batch)
    length = steps_of(here.train)
    if not (usable := [step for step in steps if 1 <= places[step] < length]):
        done = f"{places[steps[-1]]} steps of {here.train.batch} images" if steps else "none"
        raise RunError(f"{source.folder}: has done {done}; expected a longer run, got one of {length}")
    old, new = (recipe.train.constant_until for recipe in (there, here))

    def preference(step: int) -> tuple[bool, bool, int]:
        before = old is None or step <= old
        return before and (new is None or places[step] <= new), before, step

    for step in sorted(usable, key=preference, reverse=True):
        try:
            return step, places[step], checkpoint.load(source.checkpoint(step))[1]
        except checkpoint.CheckpointError as error:
            logger.warning("%s; going back to the checkpoint before it", error)
    raise RunError(f"{source.folder}: no checkpoint is whole, so that nothing can go on from it")


def _average(settings: Recipe, state: checkpoint.State) -> list[str]:
    """Lets the state have a running average where the run has one, and says so where that is new."""
    if settings.train.ema and "ema" not in state:
        state["ema"] = dict(state["model"])
        return ["its running average begins with the weights of then"]
    if not settings.train.ema and state.pop("ema", {}):
        return ["it goes on with the weights that were trained, without their running average"]
    return []


def _rate(source: Source, settings: Recipe, step: int, at: int) -> list[str]:
    """What there is to say of the rate, if the next one is not that which would have come."""
    old, new = source.recipe.train, settings.train
    last, due = rate_at(step, old), rate_at(min(step + 1, steps_of(old)), old)
    first = rate_at(at + 1, new)
    return [] if first == due else [f"the rate jumps from {last:.3g} to {first:.3g}"]
