"""Which of several processes this one is, as torchrun says it in the environment, and its share of the machine."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mpp.errors import UserError, shown
from mpp.workers import cores


class LaunchError(UserError):
    """Processes that can't train together."""


class Ended(Exception):
    """Another process has failed, and said why; this one leaves without a word."""


class Agreed(Exception):
    """What all processes raise at the same moment; one of them tells it."""


@dataclass(frozen=True)
class Launch:
    """One process of several; a process by itself is 0 of 1."""

    rank: int = 0  # of all
    size: int = 1
    local: int = 0  # of those on this machine
    local_size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes and speaks for all."""
        return self.rank == 0


def launched() -> Launch:
    """Which process this is; LaunchError if the environment says what can't be."""
    names = {"rank": "RANK", "size": "WORLD_SIZE", "local": "LOCAL_RANK", "local_size": "LOCAL_WORLD_SIZE"}
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Launch()
    found = {}
    for field, name in names.items():
        text = os.environ.get(name, str(getattr(Launch(), field)))
        if not text.isdecimal():
            raise LaunchError(f"{name}={shown(text)} in the environment: expected a whole number, as torchrun sets it")
        found[field] = int(text)
    launch = Launch(**found)
    if not (0 <= launch.rank < launch.size and 0 <= launch.local < launch.local_size <= launch.size):
        said = ", ".join(f"{name}={found[field]}" for field, name in names.items())
        raise LaunchError(f"{said} in the environment don't go together; start the processes by torchrun")
    return launch


@contextmanager
def told_once() -> Iterator[None]:
    """Lets one process of each machine tell what they all find, before they know of each other."""
    try:
        yield
    except UserError as error:
        if launched().local:
            raise Ended from error
        raise


def own_cores() -> int:
    """How many of the cores that this process may use are its own: those of a machine are shared by its processes."""
    return max(1, cores() // launched().local_size)
