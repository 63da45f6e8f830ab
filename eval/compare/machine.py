"""What a comparison leaves to the machine, chosen once for all its runs: machine.json in its folder.

Each run by itself would choose at its own start, by its own stopwatch, and two seeds could see different pixels.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpp.errors import UserError, cause
from mpp.files import locked, sealed, unsealed, write_atomically

FORMAT = 2
# What a choice may be, by the first word of its name.
VALID: dict[str, Callable[[Any], bool]] = {
    "precision": lambda value: value in ("bfloat16", "float32"),
    "compile": lambda value: type(value) is bool,
    "threads": lambda value: type(value) is int and value >= 1,
    "micro_batch": lambda value: type(value) is int and value >= 1,
    "prepare": lambda value: value in ("cpu", "device"),
}
NOT_OURS = (OSError, ValueError, LookupError, TypeError, AttributeError)  # what cut and foreign files cause


class MachineError(UserError):
    """A machine.json that can't be read."""


class Machine:
    """The choices of a comparison, which all processes that share its folder agree on."""

    def __init__(self, out: Path) -> None:
        self.path = out / "machine.json"

    def once(self, what: str, choose: Callable[[], Any]) -> Any:
        """What was chosen under this name, or what `choose` gives now; other processes wait meanwhile."""
        with locked(self.path.with_name(".machine.lock")):
            choices = self.known()
            if what not in choices:
                choices[what] = choose()
                write_atomically(self.path, sealed({"format": FORMAT, "choices": choices}))
            return choices[what]

    def known(self) -> dict[str, Any]:
        """What has been chosen; MachineError for a file that can't be read."""
        if not self.path.exists():
            return {}
        try:
            found = unsealed(self.path)
            if found["format"] != FORMAT:
                raise ValueError(f"format {found['format']}, expected {FORMAT}")
            choices: dict[str, Any] = found["choices"]
            for what, value in choices.items():
                if not VALID[what.split()[0]](value):
                    raise ValueError(f"{what} {value!r}")
            return choices
        except NOT_OURS as error:
            raise MachineError(f"{self.path}: cut, or not as it was written ({cause(error)})") from None
