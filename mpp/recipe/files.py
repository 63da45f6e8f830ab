"""Recipe files and overrides as layers of plain values, the lowest first. Nothing is resolved and no tag is obeyed."""

import re
from collections.abc import Callable, Sequence
from functools import reduce
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from mpp import budget
from mpp.differing import leaves, quoted
from mpp.errors import cause, shown
from mpp.recipe.build import dotted, merged
from mpp.recipe.check import RecipeError, near
from mpp.recipe.text import NO_YAML, read_yaml

BUNDLED = Path(str(resources.files("mpp.recipes"))).resolve()
COMMAND_LINE = "command line"  # the source that errors name for overrides


class Layer(NamedTuple):
    """Settings as they stand in one place; `source` names it in errors."""

    source: str
    values: dict[str, Any]


def bundled() -> dict[str, Path]:
    """The recipes that come along, by name; those that are only bases for others are left out."""
    files = {file.relative_to(BUNDLED).with_suffix("").as_posix(): file for file in sorted(BUNDLED.rglob("*.yaml"))}
    return {name: file for name, file in files.items() if not name.startswith("base/")}


def find(path: str | Path) -> Path:
    """The file of a recipe given by its path or by the name of a bundled one."""
    if budget.is_file(path):
        return Path(path).resolve()
    files, name = bundled(), str(path).removesuffix(".yaml")
    if name not in files:
        raise RecipeError(f"{path}: neither a recipe file nor a bundled recipe.{near(name, files)}")
    return files[name]


def name_of(file: Path) -> str:
    """The recipe's name, from the file's place: cifar10-mpp for recipes/cifar10/mpp.yaml."""
    parts = file.with_suffix("").parts
    below = len(parts) - parts[::-1].index("recipes") if "recipes" in parts[:-1] else len(parts) - 1
    return "-".join(parts[below:])


def _label(file: Path) -> str:
    """How errors name a file: below the working directory or the bundled recipes if it is there."""
    folders = [folder for folder in (Path.cwd(), BUNDLED) if file.is_relative_to(folder)]
    return str(file.relative_to(folders[0]) if folders else file)


def read_chain(file: Path, above: tuple[Path, ...] = ()) -> list[Layer]:
    """The layers of a file and its bases, the lowest first."""
    chain, label = (*above, file), _label(file)
    if file in above:
        raise RecipeError(f"{' -> '.join(map(_label, chain))}: recipes include each other")
    values = _values(lambda: read_yaml(budget.text(file)), label)
    base = values.pop("base", None)
    if base is None:
        return [Layer(label, values)]
    if not isinstance(base, str) or not budget.is_file(file.parent / base):
        raise RecipeError(f"{label}: base: expected a file beside this one, found {quoted(base)}")
    return [*read_chain((file.parent / base).resolve(), chain), Layer(label, values)]


def command_line(overrides: Sequence[str]) -> Layer:
    """The layer of `key=value` arguments."""
    for override in overrides:
        if not all(part.strip() for part in override.partition("=")):
            raise RecipeError(f"{COMMAND_LINE}: expected KEY=VALUE (null for none), found {quoted(override)}")
    return Layer(COMMAND_LINE, _values(lambda: settings_of(overrides), COMMAND_LINE))


def settings_of(arguments: Sequence[str]) -> dict[str, Any]:
    """The values of `train.lr=1e-3` and the like, a later one over those before. Raises one of NO_YAML."""
    given = (argument.partition("=") for argument in arguments)
    return reduce(merged, (dotted(key.strip(), read_yaml(value)) for key, _, value in given), dict[str, Any]())


def _values(read: Callable[[], Any], source: str) -> dict[str, Any]:
    """What is read, as plain values. Nothing is resolved and no tag is obeyed."""
    try:
        values = read()
    except OSError as error:
        raise RecipeError(f"{source}: cannot be read: {cause(error)}") from error
    except NO_YAML as error:
        problem = " ".join(re.sub(r'in "[^"]*",', "at", str(error)).split())
        raise RecipeError(f"{source}: expected keys with values in YAML, found an error: {shown(problem)}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{source}: expected keys with values, found {quoted(values)}")
    for key, value in leaves(values):
        if "${" in (key if isinstance(value, list) else f"{key}{value}"):  # lists hold names, such as those of classes
            raise RecipeError(
                f"{source}: {shown(key)}: recipes are plain values and take no ${{...}}, found {quoted(value)}"
            )
    _spell_out(values)
    return values  # keys that are no strings are unknown keys


def _spell_out(values: dict[Any, Any]) -> None:
    """Puts lists where a recipe may write a single value: `image: 32` is 32x32 pixels."""
    data, objective = values.get("data"), values.get("objective")
    views = data.get("views") if isinstance(data, dict) else None
    decoder = objective.get("decoder") if isinstance(objective, dict) else None
    sized = [values.get("model"), decoder, *(views.values() if isinstance(views, dict) else ())]
    for section in filter(lambda section: isinstance(section, dict), sized):
        if type(section.get("image")) is int:
            section["image"] = [section["image"], section["image"]]
        if type(section.get("mixer")) is str:
            section["mixer"] = [section["mixer"]]
