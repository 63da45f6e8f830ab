"""Processes that train together, as torchrun starts them but without its agent, which takes seconds to begin."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import metrics

import mpp

OF_TIME = ("images/s", "waiting", "memory")
# Of queries, keys and values; that of the keys has no gradient but rounding, as softmax does not see it.
BLIND = ".mixer.qkv.bias"
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


@contextmanager
def own_objectives(add: Callable[[], None]) -> Iterator[None]:
    """Puts a worker's objectives into the table, and takes them out again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mpp.OBJECTIVES, "_added", {})
        add()
        yield


def figures(run: Path) -> dict[int, dict[str, float]]:
    """By step all figures but those of time and memory."""
    found: dict[int, dict[str, float]] = {}
    for line in metrics(run):
        # "commonest" is of a micro-batch, another one where processes share the images to score on.
        values = {name: value for name, value in line.items() if name not in OF_TIME and "commonest" not in name}
        found.setdefault(line["step"], {}).update(values)
    return found


def close_weights(one: Path, other: Path, within: float) -> None:
    """Two files hold the same tensors, but for rounding, and for keys' biases (BLIND)."""
    result, found = load_file(one), load_file(other)
    assert {key: (value.shape, value.dtype) for key, value in result.items()} == {
        key: (value.shape, value.dtype) for key, value in found.items()
    }
    for key, value in result.items():
        if not key.endswith(BLIND):
            torch.testing.assert_close(found[key], value, rtol=0, atol=within, msg=lambda m, k=key: f"{k}: {m}")
