"""Recipes: YAML files and command-line overrides over frozen dataclasses, refused before anything is read or allocated.

Layers are merged in order: the dataclasses' defaults, base files, the file, the command line.
"""

import contextlib
import copy
import difflib
import itertools
import json
import math
import re
import types
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from fractions import Fraction
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from mpp.data.batches import batches_of
from mpp.data.config import DataConfig
from mpp.errors import UserError
from mpp.files import write_atomically
from mpp.hints import fits
from mpp.log import LogConfig
from mpp.loop import EvalConfig, TrainConfig
from mpp.models.encoder import EncoderConfig
from mpp.models.encoders import ENCODERS, build_encoder
from mpp.models.presets import presets
from mpp.models.vit_config import ViTConfig
from mpp.objectives import OBJECTIVES, Objective, ObjectiveConfig

PRESET_SIZES = ("patch", "width", "depth", "heads", "mlp")  # of an encoder; its image is the data's
UNITS = ("steps", "epochs", "images")  # in which `train` may say how long
BUNDLED = Path(str(resources.files("mpp.recipes"))).resolve()
COMMAND_LINE = "command line"  # the source that errors name for overrides
ODD_YAML = (AttributeError, KeyError, RecursionError)  # what PyYAML raises beside its own errors: "!!bool a", "[[[..."
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


class RecipeError(UserError):
    """A recipe that can't be used: one line with the file, the key, what was found and what was expected."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides a run."""

    name: str = field(compare=False)  # from the file's place, cifar10-mpp for recipes/cifar10/mpp.yaml; no key of YAML
    out: str | None = None  # run folder; runs/NAME where not given
    seed: int = 0
    weights: str | None = None  # encoder to start from: what `mpp pretrain --from` sets; random weights where not given
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
        if self.train.activation_checkpointing and not isinstance(self.model, ViTConfig):
            kind = self.model.name
            raise ValueError(f"train.activation_checkpointing needs blocks (model.name vit), and model.name is {kind}")
        try:
            with torch.device("meta"):  # shapes without memory: what the constructors refuse is refused here
                self.build()
        except (RuntimeError, ArithmeticError) as error:
            raise ValueError(f"model has impossible sizes: {str(error).splitlines()[0]}") from error

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

    def build(self) -> Objective:
        """The objective with its encoder, freshly initialised."""
        objective, _ = OBJECTIVES[self.objective.name]
        return objective(build_encoder(self.model), self.objective)

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


class Layer(NamedTuple):
    """Settings as they stand in one place; `source` names it in errors."""

    source: str
    values: dict[str, Any]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Loads a recipe file, or a bundled recipe by name ("cifar10/mpp"), under overrides such as "train.lr=1e-3".

    Raises RecipeError, one line, for whatever can't be meant.
    """
    file = _find(path)
    files, name, line = _read_chain(file), _name(file), _command_line(overrides)
    try:
        return _build([*files, line], name)
    except RecipeError:
        raise
    except ValueError as error:  # keys that do not go together: the command line's fault if the files alone are well
        source = files[-1].source
        with contextlib.suppress(ValueError):
            _build([*files, Layer(COMMAND_LINE, {})], name)
            source = COMMAND_LINE
        raise RecipeError(f"{source}: {error}") from error


def load_section(
    path: str | Path, key: str, schema: type, overrides: Sequence[str] = ()
) -> tuple[str, Path, dict[str, Any], str]:
    """A section that is not part of a run, `compare`, as plain values checked against a dataclass.

    Gives the recipe's name and folder, the section's values, and the source that errors should name.
    """
    file = _find(path)
    layers = [*_read_chain(file), _command_line(overrides)]
    values: dict[str, Any] = {}
    for layer in layers:
        section = layer.values.get(key, {})
        _check({key: section}, {key: schema}, layer.source)
        values = OmegaConf.to_container(OmegaConf.merge(values, section))  # type: ignore[assignment]
    if not values:
        raise RecipeError(f"{layers[-2].source}: {key}: missing; this recipe has nothing to {key}")
    return _name(file), file.parent, values, layers[-2].source


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Writes the whole recipe as plain YAML, atomically; `load_recipe` gives it back equal."""
    path = Path(path)
    text = f"# {recipe.name}, with every setting.\n" + OmegaConf.to_yaml(OmegaConf.create(_plain(recipe)))
    write_atomically(path, text.encode())


def differences(old: Recipe, new: Recipe) -> list[str]:
    """What differs, as "train.lr: 0.001 there, 0.0002 here"; but for `out`, as a run folder may be moved.

    Whatever the old recipe chose agrees with "auto" in the new one.
    """
    there, here = dict(_leaves(_plain(old))), dict(_leaves(_plain(new)))
    keys = [key for key in {**there, **here} if key != "out" and there.get(key) != here.get(key) != "auto"]
    return [f"{key}: {_shown(there.get(key))} there, {_shown(here.get(key))} here" for key in keys]


def list_recipes() -> list[tuple[str, str]]:
    """Each bundled recipe's name and first comment, which gives the source of its numbers and the result."""
    texts = {name: file.read_text(encoding="utf-8").splitlines() for name, file in _bundled().items()}
    comments = {name: itertools.takewhile(lambda line: line[:1] == "#", lines) for name, lines in texts.items()}
    return [(name, "\n".join(line[1:].strip() for line in comment)) for name, comment in comments.items()]


def _bundled() -> dict[str, Path]:
    files = {file.relative_to(BUNDLED).with_suffix("").as_posix(): file for file in sorted(BUNDLED.rglob("*.yaml"))}
    return {name: file for name, file in files.items() if not name.startswith("base/")}


def _find(path: str | Path) -> Path:
    if Path(path).is_file():
        return Path(path).resolve()
    bundled, name = _bundled(), str(path).removesuffix(".yaml")
    if name not in bundled:
        raise RecipeError(f"{path}: neither a recipe file nor a bundled recipe.{_near(name, bundled)}")
    return bundled[name]


def _name(file: Path) -> str:
    parts = file.with_suffix("").parts
    below = len(parts) - parts[::-1].index("recipes") if "recipes" in parts[:-1] else len(parts) - 1
    return "-".join(parts[below:])


def _label(file: Path) -> str:
    """How errors name a file: below the working directory or the bundled recipes if it is there."""
    folders = [folder for folder in (Path.cwd(), BUNDLED) if file.is_relative_to(folder)]
    return str(file.relative_to(folders[0]) if folders else file)


def _read_chain(file: Path, above: tuple[Path, ...] = ()) -> list[Layer]:
    """The layers of a file and its bases, the lowest first."""
    chain, label = (*above, file), _label(file)
    if file in above:
        raise RecipeError(f"{' -> '.join(map(_label, chain))}: recipes include each other")
    values = _values(partial(OmegaConf.load, file), label)
    base = values.pop("base", None)
    if base is None:
        return [Layer(label, values)]
    if not isinstance(base, str) or not (file.parent / base).is_file():
        raise RecipeError(f"{label}: base: expected a file beside this one, found {_shown(base)}")
    return [*_read_chain((file.parent / base).resolve(), chain), Layer(label, values)]


def _command_line(overrides: Sequence[str]) -> Layer:
    for override in overrides:
        if not all(part.strip() for part in override.partition("=")):
            raise RecipeError(f"{COMMAND_LINE}: expected KEY=VALUE (null for none), found {_shown(override)}")
    return Layer(COMMAND_LINE, _values(partial(OmegaConf.from_dotlist, list(overrides)), COMMAND_LINE))


def _values(read: Callable[[], Any], source: str) -> dict[str, Any]:
    """What is read, as plain values. Nothing is resolved and no tag is obeyed."""
    try:
        values = OmegaConf.to_container(read())
    except (YAMLError, OmegaConfBaseException, OSError, ValueError, *ODD_YAML) as error:
        problem = " ".join(re.sub(r'in "[^"]*",', "at", str(error)).split())
        raise RecipeError(f"{source}: expected keys with values in YAML, found an error: {problem}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{source}: expected keys with values, found {_shown(values)}")
    for key, value in _leaves(values):  # type: ignore[arg-type]
        if "${" in f"{key}{value}":
            raise RecipeError(f"{source}: {key}: recipes are plain values and take no ${{...}}, found {_shown(value)}")
    model = values.get("model")
    if isinstance(model, dict) and type(model.get("image")) is int:
        model["image"] = [model["image"], model["image"]]
    if isinstance(model, dict) and type(model.get("mixer")) is str:
        model["mixer"] = [model["mixer"]]
    return values  # type: ignore[return-value]  # keys that are no strings are unknown keys


def _build(layers: Sequence[Layer], name: str) -> Recipe:
    """Merges one layer at a time, so that an error names its source."""
    layers = copy.deepcopy(layers)  # as names are taken out of it
    objective, model = _kind(layers, "objective", OBJECTIVES), _kind(layers, "model", ENCODERS) or "vit"
    _expand_presets(layers)
    if objective is None:
        raise RecipeError(f"{layers[-2].source}: objective.name: missing.{_near('', OBJECTIVES)}")
    sections = {"data": DataConfig, "objective": OBJECTIVES[objective][1], "model": ENCODERS[model][1]}
    defaults = {"name": name, "out": f"runs/{name}", **{key: OmegaConf.structured(sections[key]) for key in sections}}
    names = {"objective": {"name": objective}, "model": {"name": model}}
    config = OmegaConf.merge(OmegaConf.structured(Recipe), defaults, names)
    hints = {key: hint for key, hint in {**get_type_hints(Recipe), **sections}.items() if key != "name"}
    for layer in layers:
        if layer.source != COMMAND_LINE:
            layer.values.pop("compare", None)  # not of this run: `load_section` reads it
        _check(layer.values, hints, layer.source)
        _replace_duration(config.train, layer)
        config = OmegaConf.merge(config, layer.values)
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise RecipeError(f"{layers[-2].source}: {', '.join(missing)}: missing, and without a default")
    return OmegaConf.to_object(config)  # type: ignore[return-value]  # a Recipe, as the config was made from one


def _kind(layers: Sequence[Layer], section: str, table: Collection[str]) -> str | None:
    """Takes a section's `name`, on which its other keys depend, out of all layers and gives its last value."""
    name = None
    for layer in layers:
        values = layer.values.get(section)
        if isinstance(values, dict) and "name" in values:
            name = _known(values.pop("name"), table, f"{layer.source}: {section}.name")
    return name


def _expand_presets(layers: Sequence[Layer]) -> None:
    """Puts a preset's sizes in its place: over those of the layers below, under the keys that stand beside it."""
    for layer in layers:
        values = layer.values.get("model")
        if isinstance(values, dict) and (name := values.pop("preset", None)) is not None:
            preset = presets[_known(name, presets, f"{layer.source}: model.preset")]
            layer.values["model"] = {key: getattr(preset, key) for key in PRESET_SIZES} | values


def _known(name: object, table: Collection[str], place: str) -> str:
    if not isinstance(name, str) or name not in table:
        raise RecipeError(f"{place}: unknown {_shown(name)}.{_near(name, table)}")
    return name


def _replace_duration(below: Any, layer: Layer) -> None:
    """Lets a layer's duration take the place of one in another unit below it, whose warm-up then has no meaning."""
    train = layer.values.get("train", {})
    given = [unit for unit in UNITS if train.get(unit) is not None]
    if len(given) == 1:
        for unit in set(UNITS) - {given[0]} - set(train):
            train[unit] = None
            if below[unit] is not None and below.warmup and "warmup" not in train:
                found = f"{below.warmup:g} {unit}, the recipe's"
                raise RecipeError(f"{layer.source}: train.warmup: give it in {given[0]} as well; found {found}")


def _check(values: dict[str, Any], hints: dict[str, Any], source: str, above: str = "") -> None:
    """Refuses unknown keys and values of another type; omegaconf alone would read 3 as text."""
    sections = {key: get_type_hints(hint) for key, hint in hints.items() if is_dataclass(hint)}
    for key, value in values.items():
        dotted = f"{above}{key}"
        if key not in hints:
            below = [f"{section}.{key}" for section in sections if key in sections[section]]
            raise RecipeError(f"{source}: {dotted}: unknown key.{_near(below[0] if below else key, below or hints)}")
        if key in sections and isinstance(value, dict):
            _check(value, sections[key], source, f"{dotted}.")
        elif get_origin(hints[key]) is dict and isinstance(value, dict):
            for name, part in value.items():
                if part is not None:  # null leaves out what a base names
                    _check({name: part}, {name: _required(get_args(hints[key])[1])}, source, f"{dotted}.")
        elif not fits(_tupled(value), hints[key]):
            raise RecipeError(f"{source}: {dotted}: expected {_expected(hints[key])}, found {_shown(value)}")


def _required(hint: Any) -> Any:
    """A hint without the None that it may allow."""
    return next(part for part in get_args(hint) if part is not type(None)) if type(None) in get_args(hint) else hint


def _tupled(value: Any) -> Any:
    """YAML's lists as the tuples that configs hold."""
    return tuple(map(_tupled, value)) if isinstance(value, list) else value


def _expected(hint: Any) -> str:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_expected, parts))
    if origin is Literal:
        return ("one of " if len(parts) > 1 else "") + ", ".join(map(str, parts))
    if origin is tuple:
        return f"[{', '.join('...' if part is ... else _expected(part) for part in parts)}]"
    return KINDS.get(hint, "a section of keys")


def _shown(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False, skipkeys=True)[:80]


def _near(word: object, names: Collection[str]) -> str:
    lower = {name.lower(): name for name in names}
    near = [lower[name] for name in difflib.get_close_matches(str(word).lower(), lower)]
    return f" {'Did you mean' if near else 'Expected one of'}: {', '.join(near or names)}{'?' if near else ''}"


def _plain(recipe: Recipe) -> dict[str, Any]:
    return {key: value for key, value in asdict(recipe).items() if key != "name"}


def _leaves(tree: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested dicts with their dotted keys."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value
