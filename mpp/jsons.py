"""JSON as every reader takes it, without the NaN and Infinity that Python adds to it; and files of JSON lines."""

import json
import math
from pathlib import Path
from typing import Any

from mpp import budget


def text(value: Any, **options: Any) -> str:
    """A value as JSON; options are those of `json.dumps`. ValueError for a number that is not finite."""
    return json.dumps(value, allow_nan=False, **options)


def told(value: Any) -> bytes:
    """A value for another process of ours, which takes numbers that are not finite too; for no file."""
    return json.dumps(value).encode()


def encoded(value: Any, **options: Any) -> bytes:
    """A value as a file of JSON, or a line of one."""
    return (text(value, **options) + "\n").encode()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, without values that are no numbers, as earlier versions wrote them.

    A line that was cut by a kill or a power cut, or that is not of this kind, is left out.
    """
    found = []
    for line in budget.lines(path):
        try:
            values = budget.json_of(line) if line.endswith("\n") else None
        except ValueError:
            continue
        if isinstance(values, dict):
            found.append({name: value for name, value in values.items() if _is_json(value)})
    return found


def _is_json(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
