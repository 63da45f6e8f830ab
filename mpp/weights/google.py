"""Stub."""

from typing import Any

from mpp.weights.files import Source
from mpp.weights.format import Layout

NAME = "google"


def recognises(source: Source) -> bool:
    return False


def layout(source: Source, facts: dict[str, Any]) -> Layout:
    raise NotImplementedError
