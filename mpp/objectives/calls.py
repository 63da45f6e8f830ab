"""Calls of what a user's own objective does: what they raise is one line that names objective and method."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mpp.errors import UserError, cause
from mpp.objectives import OBJECTIVES


class ObjectiveError(UserError):
    """A user's own objective raised something; its traceback is that of the error's cause."""


@contextmanager
def called(name: str, method: str, *passing: type[Exception]) -> Iterator[None]:
    """Makes one line of whatever a user's objective raises, but for a lack of memory; of mpp's own it stays a bug.

    passing: errors that somebody else makes a line of.
    """
    others: tuple[type[BaseException], ...] = (UserError, MemoryError, torch.OutOfMemoryError, *passing)
    try:
        yield
    except Exception as error:
        no_memory = isinstance(error, RuntimeError) and "alloc" in str(error)
        if isinstance(error, others) or no_memory or OBJECTIVES.is_own(name):
            raise
        words = f"objective {name}: {method}: {type(error).__name__}: {cause(error)}"
        if "meta" in str(error):
            words += "; sizes are checked on torch's meta device, where tensors have no numbers to be read"
        raise ObjectiveError(f"{words} (MPP_TRACEBACK=1 in the environment shows where)") from error
