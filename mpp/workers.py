"""Threads that work side by side, and that nobody waits for in vain."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

PATIENCE = 3.0  # seconds that threads have to end after a command has


def cores() -> int:
    """How many CPU cores this process may use: those of `taskset`, a container's cpuset or a batch system."""
    return len(allowed_cores())


def allowed_cores() -> list[int]:
    """Those cores, by number."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


@contextmanager
def workers(count: int | None = None, name: str = "") -> Iterator[ThreadPoolExecutor]:
    """A pool that is waited for at its end, but not after an error or Ctrl-C: a thread may hang in a read for ever."""
    pool, whole = ThreadPoolExecutor(count, name), False
    try:
        yield pool
        whole = True
    finally:
        pool.shutdown(wait=whole, cancel_futures=True)


def end_soon(status: int) -> None:
    """Lets the process end with that status in a few seconds, though threads of it hang, which Python would wait for.

    They do where a network file system is gone: the system does not let go of them before the process ends.
    """
    timer = threading.Timer(PATIENCE, os._exit, [status])
    timer.daemon = True
    timer.start()
