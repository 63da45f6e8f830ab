"""The errors that a user can mend, signals to stop, and how causes and names are put on one line."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class UserError(ValueError):
    """One line that names the file or key, what was found and what was expected.

    The command line prints it and exits with status 2; any other exception is a bug and shows its traceback.
    """


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised as Ctrl-C is, so that work can be left in order."""


@contextmanager
def terminable() -> Iterator[None]:
    """Makes SIGTERM raise Terminated."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # only the main thread may
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def cause(error: BaseException) -> str:
    """Why something failed, on one line: the system's words alone, without number and file name, where it has some."""
    words = error.strerror if isinstance(error, OSError) else None
    return " ".join((words or str(error)).split()) or type(error).__name__


def shown(name: object) -> str:
    """A name or path that others chose, safe to print on one line."""
    return str(name) if str(name).isprintable() else ascii(str(name))


def counted(number: int, thing: str) -> str:
    """1 shard, 2 shards."""
    return f"{number} {thing}{'' if number == 1 else 's'}"
