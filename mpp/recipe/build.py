"""Layers of plain values over one another, and the frozen dataclasses that they make. No text is interpreted."""

import types
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Union, get_args, get_origin

from mpp.recipe.check import hints_of, tupled


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Values with those of a layer over them: section by section, and whatever else as a whole."""
    both = dict(below)
    for key, value in above.items():
        under = both.get(key)
        both[key] = merged(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return both


def dotted(key: str, value: Any) -> dict[str, Any]:
    """`{"train": {"lr": 1}}` for "train.lr" and 1."""
    first, point, rest = key.partition(".")
    return {first: dotted(rest, value) if point else value}


def missing(hint: Any, values: dict[str, Any], above: str = "") -> Iterator[str]:
    """The dotted keys of a dataclass that have no default and are not given."""
    hints = hints_of(hint)
    for field in fields(hint):
        key, given = f"{above}{field.name}", field.name in values
        if not given and field.default is MISSING and field.default_factory is MISSING:
            yield key
        if given:
            yield from _missing_in(hints[field.name], values[field.name], key)


def _missing_in(hint: Any, value: Any, key: str) -> Iterator[str]:
    for part in _parts(hint):
        if isinstance(value, dict) and is_dataclass(part):
            yield from missing(part, value, f"{key}.")
        elif isinstance(value, dict) and get_origin(part) is dict:
            for name, inner in value.items():
                yield from _missing_in(get_args(part)[1], inner, f"{key}.{name}")


def made(hint: Any, value: Any) -> Any:
    """A checked value as a field of this type holds it: sections as dataclasses, lists as tuples, 1 as 1.0."""
    for part in _parts(hint):
        if isinstance(value, dict) and is_dataclass(part):
            hints = hints_of(part)  # type: ignore[arg-type]
            return part(**{name: made(hints[name], inner) for name, inner in value.items()})  # type: ignore[operator]
        if isinstance(value, dict) and get_origin(part) is dict:
            return {str(name): made(get_args(part)[1], inner) for name, inner in value.items()}
    return _plain(tupled(value), _parts(hint))


def _parts(hint: Any) -> tuple[Any, ...]:
    """The types that a hint allows."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _plain(value: Any, parts: tuple[Any, ...]) -> Any:
    if type(value) is int and float in parts and int not in parts:
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"a number of {len(str(value))} digits is too large") from None
    if isinstance(value, tuple) and (inner := next((part for part in parts if get_origin(part) is tuple), None)):
        of = [_parts(part) for part in get_args(inner) if part is not ...]
        return tuple(_plain(one, of[min(place, len(of) - 1)]) for place, one in enumerate(value))
    return value
