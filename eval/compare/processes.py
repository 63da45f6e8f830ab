"""A comparison by several processes of one machine, each with one GPU or with a share of the cores.

Each is `mpp compare` once more, as a user could start it in another terminal: they share the runs by locks in the
comparison's folder. So one that dies takes nothing with it but the run it was at, which another one goes on with.
Nothing here imports torch before it is known how many GPUs are asked for.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import mpp
from mpp.errors import UserError, counted, printable
from mpp.workers import allowed_cores

GPUS, THREADS = "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"
BAR_EVERY = 60.0  # seconds between two lines of a process's progress bar
PATIENCE = 3.0  # seconds for what a process has said to come, once it has ended
# Imports the same mpp as here, whatever the current folder holds, where `python -m` would look first.
START = "import sys; sys.path.insert(0, sys.argv.pop(1)); import mpp; del sys.path[0]; import mpp.cli; mpp.cli.main()"
ROOT = str(Path(mpp.__file__).parents[1])  # the folder that mpp is imported from
SAID = re.compile(rb"(?<=[\r\n])|(?<=\])(?=mpp: )")  # where a line ends, or a bar in whose line a message stands

_printing = threading.Lock()


class PlacesError(UserError):
    """More processes are asked for than this machine has GPUs or cores for."""


class Place(NamedTuple):
    """What one of the processes has of the machine."""

    name: str  # for people
    cores: frozenset[int]  # that it may run on
    threads: int  # the same for all, as a comparison's runs are carried out by one number of threads
    gpu: str | None  # as CUDA_VISIBLE_DEVICES names it; None where there are none

    def environment(self, before: Mapping[str, str]) -> dict[str, str]:
        """The environment of the process there: its GPU alone, and no more threads than these."""
        threads, given = self.threads, before.get(THREADS, "")
        if given.isdecimal() and int(given) > 0:
            threads = min(threads, int(given))
        return {**before, THREADS: str(threads), **({GPUS: self.gpu} if self.gpu is not None else {})}


def places(count: int, *, gpus: bool) -> list[Place]:
    """Where so many processes go: an even share of the cores each, and a GPU, in turn, if there are any.

    gpus: whether each must have a GPU of its own. Raises PlacesError if there are too few, or too few cores.
    """
    from mpp.hardware import visible_gpus

    found, cores = visible_gpus(), allowed_cores()
    if gpus and len(found) < count:
        mask = f" ({GPUS}={os.environ[GPUS]})" if GPUS in os.environ else ""
        raise PlacesError(f"--gpus {count}: needs {counted(count, 'GPU')}, found {len(found) or 'none'}{mask}")
    if not gpus and len(cores) < count:
        raise PlacesError(f"--processes {count}: needs as many cores, found {len(cores)} that it may run on")
    alone = len(found) >= count
    return [
        Place(
            f"gpu {found[i].removeprefix('GPU-')[:12]}" if alone else f"process {i}",
            frozenset(_share(cores, i, count)),
            max(1, len(cores) // count),
            found[i % len(found)] if found else None,
        )
        for i in range(count)
    ]


def _share(cores: Sequence[int], place: int, count: int) -> Sequence[int]:
    """The cores of one of so many processes: neighbours, and at least one, which it may have with others."""
    first = place * len(cores) // count
    return cores[first : max(first + 1, (place + 1) * len(cores) // count)]


@contextmanager
def _on(cores: frozenset[int]) -> Iterator[None]:
    """What is started meanwhile may run on these cores alone, on systems that know of that."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Worker:
    """A process that does runs of the comparison, whose words a thread passes on.

    over: set once it has ended and all is said. (To join the thread instead would not do: Python 3.11 takes a thread
    for ended whose join a signal interrupted.)
    """

    def __init__(self, place: Place, arguments: Sequence[str], journal: int) -> None:
        self.place, self.stopped, self.over = place, False, threading.Event()
        with _on(place.cores):
            # A group of its own: Ctrl-C in a terminal goes to the whole group, and would reach it twice.
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", START, ROOT, *arguments, "--worker", str(journal)],
                stdin=subprocess.PIPE,  # see leave_with_parent
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=place.environment(os.environ),
                pass_fds=[journal],
                process_group=0,
            )
        threading.Thread(target=self._follow, daemon=True).start()

    def stop(self, number: int) -> None:
        """Sends it a signal, if it is still there; the first SIGINT or SIGTERM lets it save its state."""
        self.stopped = True
        with suppress(ProcessLookupError):
            self.process.send_signal(number)

    def _follow(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        try:
            said = threading.Thread(target=relay, args=[self.process.stdout, self.place.name], daemon=True)
            said.start()
            status = self.process.wait()
            self.process.stdin.close()
            said.join(PATIENCE)  # a process that it left behind may hold the pipe for longer
            if status and not self.stopped:
                how = f"by {_signal(-status)}" if status < 0 else f"with status {status}"
                say(f"mpp: {self.place.name} ended early, {how}; its run is left to the others")
        finally:
            self.over.set()


def _signal(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
    return f"{name}, as the system does when memory runs out" if name == "SIGKILL" else name


def share_out(at: Sequence[Place], arguments: Sequence[str], failures: dict[str, str]) -> None:
    """Starts `mpp` with these arguments at each place and waits for all; `failures` gets what failed in any, and why.

    However this ends, none of them is left.
    """
    with tempfile.TemporaryFile() as journal:  # has no name, so that nothing is left of it
        workers: list[Worker] = []
        try:
            for place in at:
                workers.append(Worker(place, arguments, journal.fileno()))
            for worker in workers:
                worker.over.wait()
        except BaseException as error:
            stop(workers, signal.SIGINT if type(error) is KeyboardInterrupt else signal.SIGTERM)
            raise
        finally:
            journal.seek(0)
            for line in journal:
                failures.update(json.loads(line))


def stop(workers: Sequence[Worker], number: int) -> None:
    """Ends all: they save their state, at a second signal they don't, and a third one kills them."""
    for how in (number, number, signal.SIGKILL):
        try:
            for worker in workers:
                worker.stop(how)
            for worker in workers:
                worker.over.wait()
            return
        except KeyboardInterrupt:  # Terminated as well
            continue


def relay(stream: BinaryIO, name: str) -> None:
    """Passes on what a process says, line by line under its name, and of its progress bar a line now and then."""
    rest, told = b"", time.monotonic()
    with stream:
        while data := os.read(stream.fileno(), 1 << 16):
            *whole, rest = SAID.split(rest + data)
            for line in whole:
                if line.endswith(b"\r"):
                    if time.monotonic() < told + BAR_EVERY:
                        continue
                    told = time.monotonic()
                _pass_on(line, name)
        _pass_on(rest, name)


def _pass_on(line: bytes, name: str) -> None:
    if words := printable(line.decode(errors="replace").rstrip()):
        say(f"[{name}] {words}")


def say(line: str) -> None:
    """Writes a line to standard error in one piece; if nobody reads it any more, the work goes on."""
    with _printing, suppress(OSError, ValueError):
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


def leave_with_parent() -> None:
    """Stops this process as SIGTERM does, as soon as the one that started it is gone, even by SIGKILL.

    Standard input is a pipe whose other end that one alone holds. (Linux can send a signal by itself,
    PR_SET_PDEATHSIG, but when the thread ends that started this process, and not if that was before it is asked for.)
    """

    def watch() -> None:
        while os.read(0, 1 << 16):
            pass
        nobody = os.open(os.devnull, os.O_RDWR)  # reads what this process says: to write would fail
        os.dup2(nobody, 1)
        os.dup2(nobody, 2)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
