"""The processes that train one run together, and what each asks of all: started by torchrun, one a GPU or of a CPU.

One process alone needs none of it: it leads, and whatever it asks of all it answers itself.
"""

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from mpp import jsons
from mpp.batch import Batch
from mpp.errors import cause, counted
from mpp.heartbeat import Heartbeat
from mpp.launch import Agreed, Ended, Launch, LaunchError, launched, own_cores
from mpp.meeting import agreed_name

T = TypeVar("T")
ONE = Launch()
PORT = 29500  # torch's own, where the environment has none

logger = logging.getLogger("mpp.ranks")


class Turn(NamedTuple):
    """What all processes know before a step."""

    stop: int  # the signal that one of them got, or 0
    ended: bool  # whether one has no batch, as it gave up waiting for it after a signal
    first: int  # how many of the step's images come before this process's
    images: int  # of the step, over all


class Ranks:
    """The processes of a run. All of them call its methods in the same order, and wait for each other there."""

    def __init__(self, launch: Launch = ONE, heart: Heartbeat | None = None) -> None:
        self.launch, self.heart = launch, heart
        self.rank, self.size, self.leads = launch.rank, launch.size, launch.leads

    def __repr__(self) -> str:
        return f"<process {self.rank} of {self.size}>"

    def announce(self, threads: int, device: torch.device) -> None:
        """Says what trains together, in one line of the leading process; one by itself has nothing to say."""
        if self.size > 1 and self.leads:
            here = "" if self.launch.local_size == self.size else f", {self.launch.local_size} of them on this machine"
            means = "NCCL" if device.type == "cuda" else "gloo"
            each = counted(threads, "thread")
            logger.info("%d processes%s, each with %s, on %s (%s)", self.size, here, each, device.type, means)

    def turn(self, signals: Sequence[int], batch: Sized | None) -> Turn:
        """What to do in a step: as all of them do the same, each waits here for the slowest."""
        mine = (signals[0] if signals else 0, batch is None, 0 if batch is None else len(batch))
        stops, missing, counts = zip(*self.each(*mine), strict=True)
        return Turn(max(stops), any(missing), sum(counts[: self.rank]), sum(counts))

    def each(self, *numbers: int) -> list[tuple[int, ...]]:
        """The numbers that each process gives."""
        if self.size == 1:
            return [numbers]
        mine = torch.tensor(numbers, dtype=torch.int64)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        self._call(dist.all_gather, found, mine)
        return [tuple(row.tolist()) for row in found]

    def shared(self, choose: Callable[[], T]) -> T:
        """What the leading process chooses, in values that JSON has; the others do not choose."""
        if self.size == 1:
            return choose()
        return cast(T, self.gathered(choose() if self.leads else None)[0])

    def gathered(self, value: T) -> list[T]:
        """What each process gives, in values that JSON has, or in numbers that are not finite. Nothing is pickled."""
        if self.size == 1:
            return [value]
        data = jsons.told(value)
        lengths = [length for (length,) in self.each(len(data))]
        mine = torch.zeros(max(lengths), dtype=torch.uint8)
        mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        self._call(dist.all_gather, found, mine)
        return [json.loads(bytes(row[:length].tolist())) for row, length in zip(found, lengths, strict=True)]

    def average(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The mean of all processes' tensors, each in float32; one call for all of them."""
        if self.size == 1:
            return list(tensors)
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        self._call(dist.all_reduce, flat)
        flat /= self.size
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]

    def of_leading(
        self, tensors: dict[str, Tensor] | None, own: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor
    ) -> dict[str, Tensor]:
        """The leading process's tensors on the CPU, by name; the others give none.

        own: what each process keeps of a tensor.
        """
        if self.size == 1:
            return {name: own(name, tensor) for name, tensor in (tensors or {}).items()}
        given = tensors or {}
        facts = {name: [str(value.dtype).removeprefix("torch."), *value.shape] for name, value in given.items()}
        found = {}
        for name, (dtype, *shape) in self.shared(lambda: facts).items():
            value = given[name] if self.leads else torch.empty(shape, dtype=getattr(torch, dtype))
            value = value.contiguous()
            self._call(dist.broadcast, value, 0)
            found[name] = own(name, value)
        return found

    def joined(self, batch: Batch) -> Batch:
        """The whole batch, of which each process has a part, in the order of the processes."""
        if self.size == 1:
            return batch
        counts = [count for (count,) in self.each(len(batch))]
        labels = None if batch.labels is None else self._rows(batch.labels, counts)
        views = tuple(self._rows(view, counts) for view in batch.views)
        places = self._rows(torch.from_numpy(batch.whole_places), counts).numpy()
        return Batch(self._rows(batch.images, counts), labels, views, places)

    def _rows(self, tensor: Tensor, counts: Sequence[int]) -> Tensor:
        """All processes' rows of a tensor, of which each has so many."""
        padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        found = [torch.empty_like(padded) for _ in counts]
        self._call(dist.all_gather, found, padded)
        return torch.cat([rows[:count] for rows, count in zip(found, counts, strict=True)])

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Puts the leading process's numbers in the place of the others', on their devices."""
        for tensor in tensors if self.size > 1 else ():
            self._call(dist.broadcast, tensor, 0)

    def wait(self) -> None:
        """Waits until all have come here."""
        self.each(0)

    def _call(self, work: Callable[..., Any], *arguments: Any) -> None:
        """A call of torch.distributed, whose failure is one line that names the process that is gone or late."""
        if self.heart:
            self.heart.calls += 1
        try:
            work(*arguments)
        except RuntimeError as error:
            raise self._failure(error) from error

    def told(self, error: BaseException) -> BaseException:
        """An error as it is, or what stands for one that a call of torch's own made, such as FSDP's for weights."""
        link: BaseException | None = error
        while link is not None and not isinstance(error, LaunchError | Ended):
            if isinstance(link, dist.DistError) or (isinstance(link, RuntimeError) and "gloo" in str(link)):
                return self._failure(link)
            link = link.__cause__
        return error

    def _failure(self, error: RuntimeError) -> Exception:
        if self.heart is None:
            return LaunchError(f"process {self.rank} of {self.size}: the others can't be reached: {cause(error)}")
        try:
            gone = self.heart.silent_soon()
            if self.heart.failed() is not None:
                return Ended()
            if gone is not None:
                return LaunchError(f"{self.heart.who(gone)} is gone: killed, or out of memory")
            late = self.heart.late()
            if late and late != [self.rank]:
                others = ", ".join(self.heart.who(rank) for rank in late if rank != self.rank)
                return LaunchError(f"waited longer than train.timeout for {others}")
        except RuntimeError:  # the store is gone too
            return LaunchError("process 0, or torchrun beside it, is gone")
        return LaunchError(f"process {self.rank} of {self.size}: the others can't be reached: {cause(error)}")


ALONE = Ranks()
_here = ALONE


def here() -> Ranks:
    """The processes that this one trains with."""
    return _here


def of_group() -> Ranks:
    """The processes of a group that the caller has made by torch.distributed; this one alone where there is none."""
    if not dist.is_initialized():
        return ALONE
    return Ranks(replace(launched(), rank=dist.get_rank(), size=dist.get_world_size()))


@contextmanager
def together(device: str = "auto", minutes: float = 10.0) -> Iterator[Ranks]:
    """Joins the processes that torchrun started with this one, and leaves them at the end, however that comes.

    device: "cuda" or "cpu", where all of them train; "auto" is CUDA where there is some. minutes: the longest that one
        waits for the others. What it gives has `rank`, `size` and `leads`.
    Of what makes several fail one line is told; the others raise Ended.
    """
    global _here
    launch = launched()
    if launch.size == 1 or dist.is_initialized():
        yield _here
        return
    on_gpus = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    host, port = os.environ.get("MASTER_ADDR", "localhost"), int(os.environ.get("MASTER_PORT", PORT))
    try:
        kind = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
        longest = timedelta(minutes=minutes)
        store, _, _ = next(rendezvous("env://", timeout=longest))
        name = agreed_name(store, launch, 60 * minutes)
        group = dist.PrefixStore(f"{name}/group", store)
        dist.init_process_group(kind, store=group, rank=launch.rank, world_size=launch.size, timeout=longest)
        # A connection of its own: that of the group may be held by a thread that waits.
        beside = dist.TCPStore(host, port, is_master=False, timeout=longest)
        heart = Heartbeat(dist.PrefixStore(f"{name}/alive", beside), launch)
        _here = Ranks(launch, heart)
        _here.wait()
    except (RuntimeError, ValueError) as error:
        raise LaunchError(f"{host}:{port}: {launch.size} processes could not come together: {cause(error)}") from error
    heart.start()
    if not launch.leads:
        logging.getLogger("mpp").setLevel(logging.WARNING)  # what all would say, the leading one does
    if on_gpus and launch.local < torch.cuda.device_count():
        torch.cuda.set_device(launch.local)
    before = torch.get_num_threads()
    torch.set_num_threads(own_cores())
    try:
        yield _here
        _here.wait()  # nobody leaves while another one may still ask
        heart.stop()
    except Agreed:
        heart.stop()
        raise
    except BaseException as error:  # the heart goes on, and ends this process if it hangs below
        told = _here.told(error)
        try:
            first = heart.fails(cause(told))
        except RuntimeError:
            first = True
        if not first:
            raise Ended from error
        if told is not error:
            raise told from error
        raise
    finally:
        _here = ALONE
        torch.set_num_threads(before)
        dist.destroy_process_group()
