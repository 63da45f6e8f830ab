"""What the loop watches: signals to stop, where time goes, and numbers that are not finite."""

import math
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import torch
from torch import Tensor

from mpp.batch import Batch
from mpp.errors import UserError
from mpp.finite import all_finite, broken
from mpp.hardware import peak_memory
from mpp.launch import Agreed

AT_ONCE = 1.0  # seconds in which signals are the same wish: a scheduler and a launcher may both send it
# What to try where numbers are not finite any more.
REMEDIES = "Try a lower train.lr (it is {lr:g}), a longer train.warmup, train.clip=1 or train.precision=float32"


class TrainingError(UserError):
    """A run can't go on; the line says where it stopped and what to try."""


class Interrupted(Agreed):
    """A signal stopped a run, which saved its state first."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"{signal.Signals(number).name} after step {step}")
        self.number = number


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that signals to stop append to, so that the loop can stop between steps; a second one stops at once.

    They are SIGINT, SIGTERM, and SIGUSR1, by which SLURM can say that the time is nearly up.
    """
    signals: list[int] = []
    first = 0.0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if not signals:
            first = time.monotonic()
            signals.append(number)
        elif time.monotonic() - first > AT_ONCE:
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)

    kinds = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    try:
        before = {number: signal.signal(number, note) for number in kinds}
    except ValueError:  # only the main thread may; in any other, whoever runs it must stop it
        yield signals
        return
    try:
        yield signals
    finally:
        for number in kinds:
            signal.signal(number, before[number])


class Clock:
    """Counts what a run does between two logs, and finds the step at which it went wrong."""

    def __init__(self, lr: float) -> None:
        self.lr = lr
        self.reset()

    def reset(self) -> None:
        self.since, self.waited, self.paused, self.images = time.perf_counter(), 0.0, 0.0, 0
        self.steps: list[tuple[int, Tensor, Tensor]] = []

    def waits(self, batches: Iterator[Batch], signals: Sequence[int] = ()) -> Iterator[Batch]:
        """Passes batches on and counts the seconds they were waited for; only after a signal may they end."""
        asked = time.perf_counter()
        for batch in batches:
            self.waited += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()
        if not signals:
            raise TrainingError("the batches ended before train.steps; open them with train=True")

    def count(self, step: int, loss: Tensor, norm: Tensor, images: int) -> None:
        self.images += images
        self.steps.append((step, loss, norm))

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Leaves out the time of what is no training: evaluation, pictures, checkpoints."""
        asked = time.perf_counter()
        yield
        self.paused += time.perf_counter() - asked

    def check(self) -> None:
        """Raises TrainingError for the first step whose loss or gradient was not finite."""
        if not self.steps:
            return
        numbers = torch.stack([torch.stack([loss, norm]) for _, loss, norm in self.steps]).tolist()
        for (step, _, _), (loss, norm) in zip(self.steps, numbers, strict=True):
            if not math.isfinite(loss + norm):
                raise TrainingError(
                    f"step {step}: the loss is {loss:g} and the gradient's norm {norm:g}; checkpoints are from before. "
                    + REMEDIES.format(lr=self.lr)
                )
        self.steps = []

    def check_tensors(self, step: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Raises TrainingError for the first tensor that is not finite after a step: loss and gradient tell of those
        that it began with. A look at all weights, and so for when they are saved."""
        for name, tensor in tensors:
            if not all_finite(tensor):
                raise TrainingError(
                    f"step {step}: {name}: {broken(tensor)}; checkpoints are from before. {REMEDIES.format(lr=self.lr)}"
                )

    def figures(self, device: torch.device) -> dict[str, float]:
        """Speed and memory since the last call."""
        seconds = max(time.perf_counter() - self.since - self.paused, 1e-9)
        figures = {"images/s": self.images / seconds, "waiting": self.waited / seconds, "memory": peak_memory(device)}
        self.reset()
        return figures
