"""What a comparison compares: arms, seeds, label fractions and protocols, as the `compare` section of a recipe says.

Nothing here imports torch by itself: a comparison that can't be meant is refused at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpp.data.config import DataConfig
from mpp.data.subset import digest
from mpp.recipe import Recipe, RecipeError, load_recipe, load_section
from mpp.recipe.recipe import differences
from mpp.remote.urls import is_url
from mpp.shards.index import read_index, splits

from ..probes.protocols import PROTOCOLS, ProtocolError, cheap, check_names

FINETUNE = "finetune"  # stands among the protocols that a comparison names, but trains the encoder too


@dataclass(frozen=True)
class ArmConfig:
    """One way to a classifier. An arm with neither `pretrain` nor `weights` trains from scratch."""

    finetune: str  # recipe with labels, by name or by path beside the comparison's file
    pretrain: str | None = None  # recipe that each seed pretrains by
    weights: str | None = None  # encoder that somebody has pretrained already
    title: str | None = None  # for the report
    upper_bound: bool = False  # pretrained with all labels of the same images, whatever the fraction
    total_of: str | None = None  # an arm whose pretraining images this one adds to its own fine-tuning budget
    fractions: tuple[float, ...] = ()  # of the comparison's, at which it is fine-tuned; all where not given


@dataclass(frozen=True)
class CompareConfig:
    """A comparison. A seed is a whole chain: initial weights, pretraining, draw of the labels, fine-tuning."""

    arms: dict[str, ArmConfig]
    baseline: str = "scratch"  # the arm that differences are taken to
    seeds: tuple[int, ...] = (0, 1, 2)
    fractions: tuple[float, ...] = (1.0,)  # of each class's labels
    images: tuple[int, ...] = ()  # that fine-tuning sees at each fraction; the recipes' own lengths where not given
    protocols: tuple[str, ...] = field(default_factory=lambda: (FINETUNE, *cheap()))
    lrs: tuple[float, ...] = ()  # fine-tuning rates that each arm chooses from; the recipe's own where not given
    choose_at: float | None = None  # fraction at which it chooses, for all; at each fraction where not given
    hold_out: float = 0.2  # share of the labels that it chooses by, with the first seed

    def __post_init__(self) -> None:
        if not self.arms:
            raise ValueError("compare.arms must name at least one arm")
        if self.baseline not in self.arms:
            raise ValueError(f"compare.baseline must be one of {', '.join(self.arms)}, got {self.baseline}")
        for name in ("seeds", "fractions", "protocols"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"compare.{name} must be different values, at least one, got {list(values)}")
        if not all(0 < fraction <= 1 for fraction in self.fractions):
            raise ValueError(f"compare.fractions must be in (0, 1], got {list(self.fractions)}")
        if self.images and len(self.images) != len(self.fractions):
            raise ValueError(
                f"compare.images needs {len(self.fractions)} numbers, one a fraction, got {len(self.images)}"
            )
        if min(self.images, default=1) < 1 or min(self.seeds) < 0 or min(self.lrs, default=1) <= 0:
            raise ValueError("compare.images and lrs must be above 0, and seeds at least 0")
        if self.choose_at is not None and self.choose_at not in self.fractions:
            raise ValueError(f"compare.choose_at must be one of compare.fractions, got {self.choose_at}")
        if not 0 < self.hold_out < 1:
            raise ValueError(f"compare.hold_out must be in (0, 1), got {self.hold_out}")
        try:
            check_names(self.protocols, FINETUNE)
        except ProtocolError as error:
            raise ValueError(f"compare.protocols: {error}") from None
        for name, arm in self.arms.items():
            self._check_arm(f"compare.arms.{name}", arm)

    @property
    def frozen(self) -> tuple[str, ...]:
        """The protocols that leave the encoder as it is, in the order of their table."""
        return tuple(name for name in PROTOCOLS if name in self.protocols)

    def fractions_of(self, arm: str) -> tuple[float, ...]:
        """The fractions at which an arm is fine-tuned."""
        return self.arms[arm].fractions or self.fractions

    def _check_arm(self, place: str, arm: ArmConfig) -> None:
        if not place.removeprefix("compare.arms.").replace("_", "").replace("-", "").isalnum():
            raise ValueError(f"{place}: an arm's name is made of letters, digits, - and _")
        if not set(arm.fractions) <= set(self.fractions):
            raise ValueError(f"{place}.fractions must be some of compare.fractions, got {list(arm.fractions)}")
        if arm.pretrain and arm.weights:
            raise ValueError(f"{place}: pretrain ({arm.pretrain}) or weights ({arm.weights}), not both")
        if arm.total_of is not None and (arm.total_of not in self.arms or not self.arms[arm.total_of].pretrain):
            raise ValueError(f"{place}.total_of must name an arm that pretrains, got {arm.total_of}")

    def images_at(self, fraction: float) -> int | None:
        """Images that fine-tuning sees at a fraction; None for what the recipe says."""
        return self.images[self.fractions.index(fraction)] if self.images else None


@dataclass(frozen=True)
class Comparison:
    """A comparison with the recipes of its arms, which `base` and the command line have settled."""

    name: str
    out: Path
    config: CompareConfig
    pretrain: dict[str, Recipe]  # by arm, of those that pretrain
    finetune: dict[str, Recipe]  # by arm

    @property
    def data(self) -> tuple[str, str, str]:
        """The shards, a folder or its URL, that are fine-tuned on, and their train and test splits."""
        data = self.finetune[self.config.baseline].data
        assert data.val is not None
        return data.path, data.train, data.val

    def title(self, arm: str) -> str:
        return self.config.arms[arm].title or arm.replace("_", " ")

    def with_labels(self, arm: str) -> bool:
        """Whether an arm's pretraining takes labels of the images that it is then fine-tuned on."""
        recipe = self.pretrain.get(arm)
        if recipe is None or not recipe.objective.needs.labels:
            return False
        return same_images(recipe.data, self.finetune[arm].data)


def place(path: str) -> str:
    """A folder of shards, however it is named: a URL, or its absolute path."""
    return path if is_url(path) else str(Path(path).resolve())


def same_images(one: DataConfig, other: DataConfig) -> bool:
    """Whether two data sections train on the same images: in one place, or the same ones in two."""
    if (place(one.path), one.train) == (place(other.path), other.train):
        return True
    if any(is_url(data.path) or data.train not in splits(data.path) for data in (one, other)):
        return False  # not there to be looked at
    found, expected = (digest(read_index(data.path, data.train, data.allow)) for data in (one, other))
    return found == expected


def load_comparison(path: str | Path, overrides: Sequence[str] = ()) -> Comparison:
    """Loads the `compare` section of a recipe and the recipes that its arms name.

    Overrides of `compare.*` and `out` are the comparison's; all others go to every run of it. Raises RecipeError.
    """
    own = [text for text in overrides if text.startswith("compare.")]
    others = [text for text in overrides if not text.startswith(("compare.", "out="))]
    name, folder, values, source = load_section(path, "compare", CompareConfig, own)
    try:
        config = _config(values)
    except ValueError as error:
        raise RecipeError(f"{source}: {error}") from None
    out = next((text.removeprefix("out=") for text in reversed(overrides) if text.startswith("out=")), f"runs/{name}")
    pretrain, finetune = {}, {}
    for arm, settings in config.arms.items():
        recipe = finetune[arm] = _recipe(settings.finetune, folder, others)
        trains_classifier = recipe.objective.needs.labels and "classifier" in recipe.objective.results
        if not trains_classifier or recipe.data.val is None:
            raise RecipeError(
                f"{source}: compare.arms.{arm}.finetune: {settings.finetune} must train with labels and "
                "name the split to score on as data.val"
            )
        if settings.pretrain:
            pretrain[arm] = _recipe(settings.pretrain, folder, others)
    for arm, recipe in pretrain.items():
        for other in pretrain.values():
            if recipe.name == other.name and differences(recipe, other):
                raise RecipeError(
                    f"{source}: compare.arms.{arm}.pretrain: two recipes are called {recipe.name}; rename one"
                )
    comparison = Comparison(name, Path(out), config, pretrain, finetune)
    places = {arm: (place(recipe.data.path), recipe.data.train, recipe.data.val) for arm, recipe in finetune.items()}
    if len(set(places.values())) > 1:
        raise RecipeError(f"{source}: compare.arms: all must be fine-tuned on the same data, found {places}")
    for arm, settings in config.arms.items():
        if settings.upper_bound and not comparison.with_labels(arm):
            raise RecipeError(f"{source}: compare.arms.{arm}.upper_bound: its pretraining takes no labels of this data")
    return comparison


def _config(values: dict[str, Any]) -> CompareConfig:
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    arms = {}
    for name, arm in (values.pop("arms", None) or {}).items():
        if arm is not None:  # an arm of a base is left out by `NAME: null`
            if "finetune" not in arm:
                raise ValueError(
                    f"compare.arms.{name}.finetune: missing; expected the recipe that trains it with labels"
                )
            arms[str(name)] = ArmConfig(**{**arm, "fractions": tuple(map(float, arm.get("fractions", ())))})
    for key in ("fractions", "lrs"):
        if key in values:
            values[key] = tuple(map(float, values[key]))
    return CompareConfig(arms=arms, **values)


def _recipe(name: str, folder: Path, overrides: Sequence[str]) -> Recipe:
    """A recipe by its path beside the comparison's file, or by its bundled name."""
    beside = [folder / name, folder / f"{name}.yaml"]
    recipe = load_recipe(next((path for path in beside if path.is_file()), name), overrides)
    if recipe.continues is not None:
        raise RecipeError(
            f"{name}: continues ({recipe.continues}): a comparison trains each seed from its start; give "
            "its encoder as compare.arms.NAME.weights instead"
        )
    return recipe
