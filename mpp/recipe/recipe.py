"""A recipe: what its user asked for. What a run then finds and chooses is another object (mpp/run/settled.py)."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from mpp import differing
from mpp.data.config import DataConfig, batches_of
from mpp.models.encoder_config import EncoderConfig
from mpp.models.vit_config import ViTConfig
from mpp.objectives import ObjectiveConfig
from mpp.train_config import UNITS, EvalConfig, LogConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that a user decides of a run. What is left out is "auto" or None, and found or chosen at the first start."""

    name: str = field(compare=False)  # from the file's place, cifar10-mpp for recipes/cifar10/mpp.yaml; no key of YAML
    out: str | None = field(default=None, compare=False)  # run folder; runs/NAME where not given
    seed: int = 0
    weights: str | None = None  # encoder to start from: what `mpp pretrain --from` sets; random weights where not given
    continues: str | None = None  # run, or checkpoint of one, from whose whole state this goes on: what --continue sets
    model: EncoderConfig
    objective: ObjectiveConfig
    data: DataConfig
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in [0, 2 ** 63), got {self.seed}")
        unit, duration = self.duration
        if duration <= 0:
            raise ValueError(f"train.{unit} must be above 0, got {duration}")
        if self.train.warmup > duration:
            raise ValueError(f"train.warmup ({self.train.warmup} {unit}) must not exceed train.{unit} ({duration})")
        if self.train.schedule == "wsd" and self.train.warmup / duration + self.train.decay_share > 1:
            raise ValueError(
                f"train.warmup ({self.train.warmup:g} of {duration:g} {unit}) and train.decay "
                f"({self.train.decay_share:g} of the run) must not exceed the run together"
            )
        if self.train.activation_checkpointing and not isinstance(self.model, ViTConfig):
            kind = self.model.name
            raise ValueError(f"train.activation_checkpointing needs blocks (model.name vit), and model.name is {kind}")
        if self.weights is not None and self.continues is not None:
            raise ValueError(
                f"weights ({self.weights}) and continues ({self.continues}): a run that goes on has its weights "
                "from the other one; give weights=null"
            )
        if self.eval.knn and self.data.val is None and not (self.data.hold_out or self.data.subset.hold_out):
            raise ValueError(f"eval.knn ({self.eval.knn}) scores images of another split, and data.val names none")
        self._check_needs()

    def _check_needs(self) -> None:
        """Refuses what the objective can't be given: views, and batches that are not split."""
        needs, name = self.objective.needs, self.objective.name
        micro_batch, batch = self.train.micro_batch, self.train.batch
        if needs.whole_batch and micro_batch not in ("auto", batch):
            raise ValueError(
                f"train.micro_batch ({micro_batch}) must be train.batch ({batch}): objective.name {name} looks across "
                "the whole batch"
            )
        if self.objective.frozen and (self.train.layer_decay != 1 or self.train.activation_checkpointing):
            key = "activation_checkpointing" if self.train.layer_decay == 1 else "layer_decay"
            raise ValueError(f"train.{key} is of an encoder that is trained, and objective.freeze keeps it as it is")
        sizes = self.view_sizes
        if 1 + len(sizes) < needs.views:
            raise ValueError(
                f"objective.name {name} needs {needs.views} views of each image, and data.views has "
                f"{len(sizes)} beside the first; give it more, such as data.views.second.count={needs.views - 1}"
            )
        if sizes and needs.views == 1:
            raise ValueError(
                f"objective.name {name} looks at one view; data.views has {len(sizes)} more, expected none"
            )
        for name, view in self.data.views.items():
            try:
                self.model.check_image((view and view.image) or self.model.image)
            except ValueError as error:
                raise ValueError(f"data.views.{name}.image: {error}") from None

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.out or f"runs/{self.name}")

    @property
    def duration(self) -> tuple[str, float]:
        """How long to train: the unit and the number of them."""
        given = [(unit, getattr(self.train, unit)) for unit in UNITS if getattr(self.train, unit) is not None]
        if len(given) != 1:
            found = " and ".join(f"train.{unit} ({value})" for unit, value in given) or "none"
            raise ValueError(f"exactly one of train.steps, train.epochs and train.images must be given, found {found}")
        return given[0]

    @property
    def view_sizes(self) -> list[tuple[int, int]]:
        """(h, w) of the views beside the first, in pixels."""
        return [view.image for view in self.data.further_views(self.model.image)]

    def lasting(self, images: int) -> "Recipe":
        """The same recipe until that many images are seen, with a warm-up of the same share."""
        warmup = round(images * self.train.warmup / self.duration[1])
        return replace(self, train=replace(self.train, steps=None, epochs=None, images=images, warmup=warmup))

    def in_steps(self, images: int) -> "Recipe":
        """The same recipe with duration and warm-up in whole steps, for an epoch of that many images."""
        if images < 1:
            raise ValueError(f"data.train ({self.data.train}) must hold at least 1 image, found {images}")
        (unit, duration), batch, last = self.duration, self.train.batch, self.data.last_batch
        epoch = Fraction(images, batch) if last == "chained" else Fraction(batches_of(images, batch, last))
        steps_of = {"steps": Fraction(1), "epochs": epoch, "images": epoch / images}[unit]
        # By way of text, so that 0.1 is one tenth and 0.1 epochs of 50,000 images are not one step too many.
        steps, warmup = (math.ceil(Fraction(str(value)) * steps_of) for value in (duration, self.train.warmup))
        return replace(self, train=replace(self.train, steps=steps, epochs=None, images=None, warmup=warmup))


BY_CONTENT = (
    "weights",
    "continues",
    "data.path",
    "data.source",
)  # known by what lies there, which may lie elsewhere next time

# Settings with which a run can go on otherwise, beside those that its encoder and objective call adjustable.
ADJUSTABLE = ("train.", "eval.", "data.val", "data.augment.", "data.views", "data.last_batch", "data.prepare")
ADAMS = {'"adam"', '"adamw"'}  # whose state is the same


def plain(recipe: Recipe) -> dict[str, Any]:
    """A recipe as nested dicts of plain values."""
    return {key: value for key, value in asdict(recipe).items() if key != "name"}


def differences(old: Recipe, new: Recipe) -> list[str]:
    """What differs between two recipes in what a run computes, as "train.lr: 0.001 there, 0.0002 here".

    Whatever the old recipe chose agrees with "auto" in the new one; null is filled in before (`Settled.for_machine`).
    """
    return differing.differing(computed(old), computed(new))


def computed(recipe: Recipe) -> dict[str, Any]:
    """What decides what a run computes, by dotted key."""
    return differing.computed(plain(recipe)) | {"data.views": _order(recipe)}


def _order(recipe: Recipe) -> str:
    """The names of the views in order, by which they are numbered and drawn."""
    return ", ".join(name for name, view in recipe.data.views.items() if view is not None)


def changes(old: Recipe, new: Recipe) -> list[str]:
    """The same, but for places of data and weights: whether these are the same is told by their content."""
    moved = {f"data.mix.{name}.path" for name in old.data.mixed.keys() & new.data.mixed.keys()} | {*BY_CONTENT}
    return [line for line in differences(old, new) if line.partition(":")[0] not in moved]


def lasting(changes: Sequence[str], recipe: Recipe) -> list[str]:
    """Those of the changes to a run's recipe with which it can't go on from the state that it has."""
    return [line for line in changes if not _adjustable(line, recipe)]


def _adjustable(change: str, recipe: Recipe) -> bool:
    key, _, values = change.partition(": ")
    section, _, name = key.partition(".")
    if section in ("model", "objective"):
        return name in (recipe.model if section == "model" else recipe.objective).adjustable
    if key == "train.optimizer":
        return {value.split()[0] for value in values.split(", ")} <= ADAMS
    return key.startswith(ADJUSTABLE)
