"""Checkpoints written in the background: training takes a copy of its state, and goes on while the copy is written."""

import logging
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType

import torch

from mpp import checkpoint
from mpp.checkpoint import State
from mpp.errors import UserError
from mpp.split import whole
from mpp.workers import PATIENCE

logger = logging.getLogger("mpp.saving")


def on_host(state: State, leads: bool = True) -> State:
    """A copy of a state in the CPU's memory; a tensor that stands in several of its files is copied once.

    What is split among processes is put together tensor by tensor, for which all of them call this. leads: whether this
    one is to have the copy; the others get nothing.

    Waits for the device once. From a GPU it goes into page-locked memory, which torch keeps for the next copy.
    """
    own = {id(tensor): tensor for tensors in state.values() for tensor in tensors.values()}
    copies = {}
    for key, tensor in own.items():
        full = whole(tensor.detach())
        if leads:
            copies[key] = full.to("cpu", copy=True, non_blocking=True)
    if not leads:
        return {}
    for device in {tensor.device for tensor in own.values() if tensor.device.type != "cpu"}:
        torch.accelerator.synchronize(device)
    return {name: {key: copies[id(tensor)] for key, tensor in tensors.items()} for name, tensors in state.items()}


class Writer:
    """Writes checkpoints one after the other in a thread of its own, each as `checkpoint.save` does.

    What a write failed with is raised by whatever is called next. As a context it waits at its end, however that comes
    about, for the write under way: long after Ctrl-C it does not, as a disk may hang for ever.
    """

    def __init__(self, folder: Path, metadata: dict[str, str], keep: int, kept: Collection[int] = ()) -> None:
        """What `checkpoint.save` takes for all steps."""
        self._folder, self._rest = folder, (metadata, keep, kept)
        self._thread = ThreadPoolExecutor(1, "write checkpoints")
        self._writing: Future[Path] | None = None

    def write(self, step: int, state: State) -> None:
        """Begins to write a state on the CPU that nobody changes any more, once the one before is on the disk."""
        self.wait()
        self._writing = self._thread.submit(checkpoint.save, self._folder, step, state, *self._rest)

    def check(self) -> None:
        """Raises what a write failed with that has ended; takes no time, and so is for every step."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Returns when all that was to be written is on the disk."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None  # not before: what failed is told until it is heard

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writing is None:
            return self._thread.shutdown()
        wait([self._writing], PATIENCE if isinstance(error, KeyboardInterrupt) else None)
        ended = self._writing.done()
        self._thread.shutdown(wait=ended)
        if error is None:
            self.wait()
        elif ended and (failed := self._writing.exception()) is not None and failed is not error:
            # Training's own error is the one to tell; but nobody should look for this checkpoint.
            logger.warning("%s", failed, exc_info=None if isinstance(failed, UserError) else failed)
