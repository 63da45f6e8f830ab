"""What differs between two sets of settings, by which a folder knows whether a run is the one that it holds."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from mpp.errors import shown, without_secrets

# Settings that change how a run goes, but not what it computes.
FREE = (
    "out", "log.", *(f"train.{name}" for name in ("save_every", "keep", "timeout", "shard")),
    *(f"data.{name}" for name in ("threads", "reader", "memory")),
)  # fmt: skip
FETCHING = ("data.cache", "data.cache_gib", "data.allow")


def leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested dicts with their dotted keys."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def computed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What of nested settings decides what a run computes, by dotted key."""
    return {key: value for key, value in leaves(tree) if not key.startswith((*FREE, *FETCHING))}


def differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What differs between settings by dotted key, as "train.lr: 0.001 there, 0.0002 here".

    Whatever was chosen there agrees with "auto" here.
    """
    keys = [key for key in {**there, **here} if there.get(key) != here.get(key) != "auto"]
    return [f"{key}: {quoted(there.get(key))} there, {quoted(here.get(key))} here" for key in keys]


def quoted(value: Any) -> str:
    """A value as JSON, cut short, on one line, without the secrets of addresses, which a cut could hide."""
    return shown(without_secrets(json.dumps(value, default=str, ensure_ascii=False, skipkeys=True))[:80])
