"""Processes that train together, as torchrun starts them but without its agent, which takes seconds to begin."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

PATIENCE = 120  # seconds
STARTED: list[subprocess.Popen[str]] = []  # and not yet waited for


class Left(NamedTuple):
    """What a process leaves."""

    status: int
    said: str  # on stderr


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start(count: int, command: Sequence[str], cwd: Path, **more: str) -> list[subprocess.Popen[str]]:
    """So many processes of `python COMMAND`, of one thread each."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count), **more}
    shared |= {"LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=cwd,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(count)
    ]
    STARTED.extend(processes)
    return processes


def left(processes: Sequence[subprocess.Popen[str]], patience: float = PATIENCE) -> list[Left]:
    """Waits for their ends; kills them all if one takes too long."""
    try:
        said = [process.communicate(timeout=patience)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            STARTED.remove(process)
    return [Left(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def lines(said: str) -> list[str]:
    """What mpp itself says, its progress bars left out."""
    return [line for line in said.replace("\r", "\n").split("\n") if line.startswith("mpp: ")]
