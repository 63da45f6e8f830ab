"""Values of recipes against the type hints of config fields, and the words of what is wrong with them."""

import difflib
import types
from collections.abc import Collection
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mpp.differing import quoted
from mpp.errors import UserError, shown
from mpp.hints import fits

KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


class RecipeError(UserError):
    """A recipe that can't be used: one line with the file, the key, what was found and what was expected."""


def known(name: object, table: Collection[str], place: str) -> str:
    """A name that must be in a table."""
    if not isinstance(name, str) or name not in table:
        raise RecipeError(f"{place}: unknown {quoted(name)}.{near(name, table)}")
    return name


def hints_of(config: type[Any]) -> dict[str, Any]:
    """The keys of a section: the types of a dataclass's fields, without what belongs to the class."""
    hints = get_type_hints(config)
    return {field.name: hints[field.name] for field in fields(config)}


def check(values: dict[str, Any], hints: dict[str, Any], source: str, above: str = "") -> None:
    """Refuses unknown keys and values of another type: 3 is no text."""
    sections = {key: hints_of(_required(hint)) for key, hint in hints.items() if is_dataclass(_required(hint))}
    for key, value in values.items():
        dotted = f"{above}{key}"
        if key not in hints:
            below = [f"{section}.{key}" for section in sections if key in sections[section]]
            raise RecipeError(
                f"{source}: {shown(dotted)}: unknown key.{near(below[0] if below else key, below or hints)}"
            )
        if key in sections and isinstance(value, dict):
            check(value, sections[key], source, f"{dotted}.")
        elif get_origin(hints[key]) is dict and isinstance(value, dict):
            for name, part in value.items():
                if part is not None:  # null leaves out what a base names
                    check({name: part}, {name: _required(get_args(hints[key])[1])}, source, f"{dotted}.")
        elif not fits(tupled(value), hints[key]):
            raise RecipeError(f"{source}: {shown(dotted)}: expected {_expected(hints[key])}, found {quoted(value)}")


def _required(hint: Any) -> Any:
    """A hint without the None that it may allow."""
    parts = [part for part in get_args(hint) if part is not type(None)]
    return parts[0] if len(parts) == 1 < len(get_args(hint)) else hint


def tupled(value: Any) -> Any:
    """YAML's lists as the tuples that configs hold."""
    return tuple(map(tupled, value)) if isinstance(value, list) else value


def _expected(hint: Any) -> str:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_expected, parts))
    if origin is Literal:
        return ("one of " if len(parts) > 1 else "") + ", ".join(map(str, parts))
    if origin is tuple:
        return f"[{', '.join('...' if part is ... else _expected(part) for part in parts)}]"
    return KINDS.get(hint, "a section of keys")


def near(word: object, names: Collection[str]) -> str:
    """The names that are most like a word, or all of them, as a sentence to end an error with."""
    lower = {name.lower(): name for name in names}
    close = [lower[name] for name in difflib.get_close_matches(str(word).lower(), lower)]
    return f" {'Did you mean' if close else 'Expected one of'}: {', '.join(close or names)}{'?' if close else ''}"
