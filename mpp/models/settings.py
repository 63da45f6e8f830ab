"""What the settings of all models share: they are checked by type and name before anything else. No torch."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from mpp.errors import shown
from mpp.hints import fits


class Settings:
    """The base of frozen dataclasses: lists become tuples, and a value of another type than its field's is refused."""

    section: ClassVar[str] = "model"  # of a recipe: errors name a setting by it

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        self.check_types(vars(self))

    @classmethod
    def check_types(cls, values: Mapping[str, Any]) -> None:
        """Raises ValueError for the first of some settings that is not of its field's type, or none of its choices."""
        hints = get_type_hints(cls)
        for name, value in values.items():
            if not fits(value, hints[name]):
                hint, found = hints[name], shown(repr(value)[:80])
                plain = hint.__name__ if hint in (int, float, bool, str) else hint
                expected = f"one of {', '.join(map(str, get_args(hint)))}" if get_origin(hint) is Literal else plain
                raise ValueError(f"{cls.section}.{name} must be {expected}, got {found}")
