"""Processes that train together tell each other that they live, so that none waits for one that died or was stopped."""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable

from torch.distributed import Store

from mpp.errors import printable
from mpp.launch import Launch

BEAT = 3.0  # seconds between two signs of life
SILENT = 40.0  # seconds without one, after which a process is taken for dead or stopped; all are gone within 60
LATE = 3 * BEAT  # a process that itself was stopped for so long knows nothing of the others' silence
LEAVING = 10.0  # seconds that a process has to leave by itself once another one has failed
FAILED = "failed"


class Heartbeat:
    """A thread that sets this process's count in a store, and watches those of the others.

    ended: what is called with one line, from that thread, when another process is silent.
    """

    def __init__(self, store: Store, launch: Launch, ended: Callable[[str | None], None] | None = None) -> None:
        self._store, self._launch, self._ended = store, launch, ended or end
        self._stop = threading.Event()
        self._beats = 0
        self.calls = 0  # of the others that this process has waited for, by which it tells who is late
        self._names = [f"alive/{rank}" for rank in range(launch.size)]
        store.set(f"who/{launch.rank}", f"{socket.gethostname()}, process {os.getpid()}")
        self._beat()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begins to watch; every process has given its first sign of life."""
        self._thread.start()

    def stop(self) -> None:
        """Ends it, when all processes are about to leave."""
        self._stop.set()
        self._thread.join(BEAT)

    def fails(self, line: str) -> bool:
        """Says that this process fails; whether it is the first to, whose line is told."""
        first = self._store.compare_set(FAILED, "", f"{self._launch.rank} {line}").decode()
        return first.split()[0] == str(self._launch.rank)

    def failed(self) -> str | None:
        """What the first process to fail has said, after its number; None if none has."""
        return self._store.get(FAILED).decode() if self._store.check([FAILED]) else None

    def silent_soon(self) -> int | None:
        """The process that stops giving signs of life, looked at for some beats; None if all live, or one has failed
        and said so."""
        before = self._store.multi_get(self._names)
        for _ in range(2):
            time.sleep(BEAT)
            if self.failed() is not None:
                return None
        after = self._store.multi_get(self._names)
        same = [rank for rank, pair in enumerate(zip(before, after, strict=True)) if pair[0] == pair[1]]
        return next((rank for rank in same if rank != self._launch.rank), None)

    def late(self) -> list[int]:
        """The processes that have come less far than the others."""
        calls = [int(value.decode().split()[1]) for value in self._store.multi_get(self._names)]
        return [rank for rank, count in enumerate(calls) if count < max(calls)]

    def who(self, rank: int) -> str:
        """A process as a user finds it."""
        return f"process {rank} of {self._launch.size} ({self._store.get(f'who/{rank}').decode()})"

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(self._names[self._launch.rank], f"{self._beats} {self.calls}")

    def _watch(self) -> None:
        last = time.monotonic()
        seen = {rank: (b"", last) for rank in range(self._launch.size) if rank != self._launch.rank}
        leave = float("inf")
        while not self._stop.wait(BEAT):
            try:
                self._beat()
                values = self._store.multi_get(self._names)
                failed = self.failed()
            except RuntimeError:
                if not self._stop.is_set():
                    self._ended("process 0, or torchrun beside it, is gone, by which the others know of each other")
                return
            now = time.monotonic()
            forgiven, last = now - last > LATE, now
            for rank, (value, since) in seen.items():
                if values[rank] != value or forgiven:
                    seen[rank] = values[rank], now
                elif now - since > SILENT and failed is None:
                    line = f"{self.who(rank)} gave no sign of life for {now - since:.0f} s: it died, or was stopped"
                    self._ended(line if self.fails(line) else None)
                    return
            if failed is not None and leave > now + LEAVING:
                leave = now + LEAVING
            if now > leave:
                self._ended(None)
                return


def end(line: str | None) -> None:
    """Ends this process at once, whatever it waits for, with a line if there is one to say."""
    if line is not None:
        print(f"mpp: {printable(line)}; start again to go on from the last checkpoint", file=sys.stderr, flush=True)
    os._exit(1)
