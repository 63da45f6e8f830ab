"""Whether values are what type hints of config fields say; for recipes and for configs made in Python."""

import math
import types
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin

MOST = 2**63  # torch's whole numbers end here


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's type; numbers must be finite, and truth values are none."""
    parts = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if get_origin(hint) is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if get_origin(hint) is tuple:
        wanted = parts[:1] * len(value) if isinstance(value, tuple) and parts[-1] is ... else parts
        return isinstance(value, tuple) and len(value) == len(wanted) and all(map(fits, value, wanted))
    if hint is int:
        return isinstance(value, Integral) and not isinstance(value, bool) and abs(int(value)) < MOST
    if hint is float:
        return isinstance(value, Real) and not isinstance(value, bool) and -math.inf < value < math.inf  # type: ignore[operator]  # no float(value): it may be too large for one
    return type(value) is hint
