"""Processes, here threads, that find each other in a store which earlier ones have used."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from mpp.launch import Launch, LaunchError
from mpp.meeting import agreed_name

SIZE = 3


@pytest.fixture
def ports():
    """Connections of SIZE processes to one store, which outlives them as torchrun's does."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def connected() -> list[dist.Store]:
        wait = timedelta(seconds=10)
        return [dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=wait) for _ in range(SIZE)]

    return connected


def meet(stores: list[dist.Store], late: int | None = None, seconds: float = 10) -> list[str]:
    """The names that all processes give; one may come later than the others."""

    def come(rank: int) -> str:
        time.sleep(0.4 * (rank == late))
        return agreed_name(stores[rank], Launch(rank, SIZE, rank, SIZE), seconds)

    with ThreadPoolExecutor(SIZE) as processes:
        return list(processes.map(come, range(SIZE)))


@pytest.mark.parametrize("late", [None, 0, 1, 2])
def test_all_agree_on_a_name_that_is_new_at_every_start_whoever_comes_last(ports, late):
    names = [meet(ports(), late) for _ in range(3)]
    assert all(len(set(each)) == 1 for each in names), "one name each time"
    assert len({each[0] for each in names}) == 3, "and never one that an earlier start had"


def test_those_of_a_start_that_never_came_together_hinder_nobody(ports):
    stores = ports()
    with ThreadPoolExecutor(2) as processes:  # process 2 dies before it comes
        gone = [processes.submit(agreed_name, stores[rank], Launch(rank, SIZE), 0.3) for rank in (0, 1)]
        for one in gone:
            with pytest.raises(LaunchError, match="process 2 has not come"):
                one.result()
    assert len(set(meet(ports(), late=1))) == 1


def test_who_has_not_come_is_named(ports):
    meet(ports())
    stores = ports()
    with ThreadPoolExecutor(2) as processes:
        waiting = [processes.submit(agreed_name, stores[rank], Launch(rank, SIZE), 0.6) for rank in (0, 1)]
        for one in waiting:
            with pytest.raises(LaunchError, match=r"process 2 has not come in 0\.01 minutes"):
                one.result()
