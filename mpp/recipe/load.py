"""From recipe files and overrides to a checked Recipe, and back.

Layers are merged in order: the dataclasses' defaults, base files, the file, the command line.
"""

import contextlib
import copy
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

from mpp.augment.config import AugmentConfig
from mpp.data.config import DataConfig
from mpp.extend import Kind, Table
from mpp.files import write_atomically
from mpp.models.encoders import ENCODERS, build_encoder
from mpp.models.presets import presets
from mpp.objectives import OBJECTIVES, build_objective
from mpp.recipe.build import made, merged, missing
from mpp.recipe.check import RecipeError, check, known, near
from mpp.recipe.files import COMMAND_LINE, Layer, bundled, command_line, find, name_of, read_chain
from mpp.recipe.recipe import Recipe, plain
from mpp.recipe.settled import FILE as SETTLED
from mpp.recipe.settled import imports_of
from mpp.recipe.text import write_yaml
from mpp.remote.urls import kept_url
from mpp.train_config import UNITS

PRESET_SIZES = ("patch", "width", "depth", "heads", "mlp")  # of an encoder; its image is the data's


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Loads a recipe file, or a bundled recipe by name ("cifar10/mpp"), under overrides such as "train.lr=1e-3".

    Raises RecipeError, one line, for whatever can't be meant.
    """
    file = find(path)
    files, line = read_chain(file), command_line(overrides)
    try:
        recipe = _build([*files, line], file)
        check_sizes(recipe)
    except RecipeError:
        raise
    except ValueError as error:  # keys that do not go together: the command line's fault if the files alone are well
        source = files[-1].source
        with contextlib.suppress(ValueError):
            check_sizes(_build([*files, Layer(COMMAND_LINE, {})], file))
            source = COMMAND_LINE
        raise RecipeError(f"{source}: {error}") from error
    if (file.parent / SETTLED).exists() and "out" not in line.values:
        return replace(recipe, out=str(file.parent))  # a run's own recipe means that run, wherever it was moved
    return recipe


def check_sizes(recipe: Recipe) -> None:
    """Raises ValueError for what the constructors refuse, before anything is read or allocated.

    Encoder and objective are built on torch's "meta" device: shapes without memory. Torch is imported only here, so
    that keys and types are answered at once.
    """
    import torch

    from mpp.objectives.calls import called

    try:
        with torch.device("meta"):
            encoder = build_encoder(recipe.model)
            with called(recipe.objective.name, "its constructor", ValueError):
                build_objective(encoder, recipe.objective)
    except (RuntimeError, ArithmeticError) as error:
        raise ValueError(f"model has impossible sizes: {str(error).splitlines()[0]}") from error


def load_section(
    path: str | Path, key: str, schema: type, overrides: Sequence[str] = ()
) -> tuple[str, Path, dict[str, Any], str]:
    """A section that is not part of a run, `compare`, as plain values checked against a dataclass.

    Gives the recipe's name and folder, the section's values, and the source that errors should name.
    """
    file = find(path)
    layers = [*read_chain(file), command_line(overrides)]
    values: dict[str, Any] = {}
    for layer in layers:
        section = layer.values.get(key, {})
        check({key: section}, {key: schema}, layer.source)
        values = merged(values, section)
    if not values:
        raise RecipeError(f"{layers[-2].source}: {key}: missing; this recipe has nothing to {key}")
    return name_of(file), file.parent, values, layers[-2].source


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Writes the whole recipe as plain YAML, atomically; `load_recipe` gives it back equal.

    But for URLs, of which only the address is kept: others may read the file.
    """
    path = Path(path)
    text = f"# {recipe.name}, with every setting.\n" + write_yaml(_addresses(plain(recipe)))
    write_atomically(path, text.encode())


def _addresses(value: Any) -> Any:
    """Nested plain values with the addresses of URLs in their place."""
    if isinstance(value, dict):
        return {key: _addresses(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_addresses(part) for part in value]
    return kept_url(value) if isinstance(value, str) else value


def list_recipes() -> list[tuple[str, str]]:
    """Each bundled recipe's name and first comment, which gives the source of its numbers and the result."""
    texts = {name: file.read_text(encoding="utf-8").splitlines() for name, file in bundled().items()}
    comments = {name: itertools.takewhile(lambda line: line[:1] == "#", lines) for name, lines in texts.items()}
    return [(name, "\n".join(line[1:].strip() for line in comment)) for name, comment in comments.items()]


def _build(layers: Sequence[Layer], file: Path) -> Recipe:
    """Merges one layer at a time, so that an error names its source."""
    layers, name = copy.deepcopy(layers), name_of(file)  # a copy, as names are taken out of it
    folders = [Path(str(low.values["out"])) for low in reversed(layers) if low.values.get("out")]
    folders = [*folders[:1], Path(f"runs/{name}"), file.parent]
    model = _kind(layers, "model", ENCODERS, folders) or "vit"
    objective = _kind(layers, "objective", OBJECTIVES, folders, drops=True)
    _expand_presets(layers)
    if objective is None:
        raise RecipeError(f"{layers[-2].source}: objective.name: missing.{near('', OBJECTIVES)}")
    sections = {"data": DataConfig, "objective": OBJECTIVES[objective].config, "model": ENCODERS[model].config}
    values: dict[str, Any] = {"out": f"runs/{name}", "data": {}}
    values |= {"objective": {"name": objective}, "model": {"name": model}}
    hints = {key: hint for key, hint in {**get_type_hints(Recipe), **sections}.items() if key != "name"}
    for layer in layers:
        if layer.source != COMMAND_LINE:
            layer.values.pop("compare", None)  # not of this run: `load_section` reads it
        check(layer.values, hints, layer.source)
        _replace_duration(values.get("train", {}), layer)
        values = merged(values, layer.values)
    if lacking := sorted(key for name, kind in sections.items() for key in missing(kind, values[name], f"{name}.")):
        raise RecipeError(f"{layers[-2].source}: {', '.join(lacking)}: missing, and without a default")
    _check_views(values["data"].get("views", {}))
    return Recipe(name=name, **{key: made(hints[key], value) for key, value in values.items()})


def _check_views(views: dict[str, Any]) -> None:
    """Refuses an augmentation by the name of the view that it is of: as a section it only knows itself."""
    for name, view in views.items():
        try:
            made(AugmentConfig, view["augment"]) if view is not None and view.get("augment") is not None else None
        except ValueError as error:
            raise ValueError(str(error).replace("data.augment.", f"data.views.{name}.augment.")) from None


def _kind(
    layers: Sequence[Layer], section: str, table: Table[Kind], folders: Sequence[Path], *, drops: bool = False
) -> str | None:
    """Takes a section's `name`, on which its other keys depend, out of all layers and gives its last value.

    folders: of runs that may tell by which import they had a name that is not known. drops: where a layer chooses
        another one, what the layers below say of theirs has no meaning and goes.
    """
    given = []  # the layers that choose, the lowest first: number and name
    for number, layer in enumerate(layers):
        values = layer.values.get(section)
        if isinstance(values, dict) and "name" in values:
            given.append((number, values.pop("name")))
    if not given:
        return None
    last, chosen = given[-1]
    name = _known_kind(chosen, table, f"{layers[last].source}: {section}.name", folders)
    for (_, below), (number, above) in itertools.pairwise(given):
        if drops and above != below:
            for layer in layers[:number]:
                said = {section: layer.values.pop(section, {})}
                if isinstance(below, str) and below in table:  # else it needs an import that is not wanted here
                    check(said, {section: table[below].config}, layer.source)
    return name


def _known_kind(name: object, table: Table[Kind], place: str, folders: Sequence[Path]) -> str:
    """A name of the table; of one that is not there, by which import the run in one of the folders had it."""
    key = place.rpartition(": ")[2]
    if isinstance(name, str) and name not in table:
        for folder in folders:
            if origin := imports_of(folder).get(key):
                raise RecipeError(f"{place}: {name} is not known; {folder} began with --import {origin}, give it again")
    try:
        return known(name, table, place)
    except RecipeError as error:
        raise RecipeError(f"{error} (your own: --import FILE.py, docs/extending.md)") from None


def _expand_presets(layers: Sequence[Layer]) -> None:
    """Puts a preset's sizes in its place: over those of the layers below, under the keys that stand beside it."""
    for layer in layers:
        values = layer.values.get("model")
        if isinstance(values, dict) and (name := values.pop("preset", None)) is not None:
            preset = presets[known(name, presets, f"{layer.source}: model.preset")]
            layer.values["model"] = {key: getattr(preset, key) for key in PRESET_SIZES} | values


def _replace_duration(below: dict[str, Any], layer: Layer) -> None:
    """Lets a layer's duration take the place of one in another unit below it, whose warm-up then has no meaning."""
    train = layer.values.get("train", {})
    given = [unit for unit in UNITS if train.get(unit) is not None]
    if len(given) == 1:
        for unit in set(UNITS) - {given[0]} - set(train):
            train[unit] = None
            if below.get(unit) is not None and below.get("warmup") and "warmup" not in train:
                found = f"{below['warmup']:g} {unit}, the recipe's"
                raise RecipeError(f"{layer.source}: train.warmup: give it in {given[0]} as well; found {found}")
