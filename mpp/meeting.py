"""Where processes that torchrun started find each other: in its store, which still holds what earlier ones left there.

torchrun keeps one store for all its restarts (torch 2.14, elastic/rendezvous), and gloo and nccl take the addresses
that they find in it: those of processes that are dead. The number of restarts does not tell which are new, for each
machine counts its own. So the processes agree on a name that no others ever had, below which all of theirs stands.
"""

import hashlib
import secrets
import time

from torch.distributed import Store

from mpp.launch import Launch, LaunchError

POLL = 0.05  # seconds between two looks


def agreed_name(store: Store, launch: Launch, seconds: float) -> str:
    """A name that all processes of this start give, and no others; LaunchError if not all have come in so long.

    Each leaves a number of its own. The leading one says which it finds, the others agree once theirs is among them,
    and when all have agreed to the same numbers it is settled: no dead one has.
    """
    own, end = secrets.token_hex(8), time.monotonic() + seconds
    places = [f"mpp/place/{rank}" for rank in range(launch.size)]
    store.set(places[launch.rank], own)
    while True:
        if launch.leads and store.check(places):
            store.set("mpp/said", " ".join(number.decode() for number in store.multi_get(places)))
        said = store.get("mpp/said").decode() if store.check(["mpp/said"]) else ""
        name, waited_for = f"mpp/{hashlib.sha256(said.encode()).hexdigest()[:16]}", places
        if own in said.split():
            waited_for = [f"{name}/agrees/{rank}" for rank in range(launch.size)]
            store.set(waited_for[launch.rank], "")
            if launch.leads and store.check(waited_for):
                store.set(f"{name}/settled", "")
            if store.check([f"{name}/settled"]):
                return name
        if time.monotonic() > end:
            lacking = next((rank for rank, key in enumerate(waited_for) if not store.check([key])), 0)
            raise LaunchError(f"process {lacking} has not come in {seconds / 60:g} minutes")
        time.sleep(POLL)
