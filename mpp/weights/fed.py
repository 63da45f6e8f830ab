"""What an encoder from a file is fed: as the file says, or as whoever loads it asks (`image=224`, `centre=0.875`)."""

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from mpp.augment.input import Input
from mpp.errors import cause, shown
from mpp.models.encoder import Encoder
from mpp.weights.files import WeightsError

KEY = "mpp_input"  # in JSON of ours, beside what other libraries understand, which round to whole pixels
NAMES = tuple(field.name for field in fields(Input))  # that `load_encoder` takes for files of any kind

E = TypeVar("E", bound=Encoder)


def apart(path: Path, facts: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is told of an encoder, and what it is to be fed; WeightsError if that can't be."""
    asked = {name: facts[name] for name in NAMES if facts.get(name) is not None}
    if "image" in asked:
        image = asked["image"]
        asked["image"] = (image, image) if type(image) is int else tuple(image) if isinstance(image, list) else image
    try:
        Input(**({"image": (1, 1)} | asked))
    except (ValueError, TypeError) as error:
        raise WeightsError(f"{shown(path)}: {shown(cause(error))}") from error
    return {name: value for name, value in facts.items() if name not in NAMES}, asked


def fed(encoder: E, asked: Mapping[str, Any], path: str | Path) -> E:
    """The encoder as it is to be fed: for images of another size a copy, whose positions are resampled for them."""
    asked = {name: value for name, value in asked.items() if value is not None}
    image = asked.get("image", encoder.config.image)
    if image != encoder.config.image:
        try:
            encoder = encoder.resized(image)
        except ValueError as error:
            raise WeightsError(f"{shown(path)}: image={image[0]}x{image[1]}: {cause(error)}") from error
    encoder.input = replace(encoder.input, **asked)
    return encoder


def written(fed: Input) -> dict[str, Any]:
    """What JSON of ours says beside what other libraries look for, so that mpp reads back what it wrote."""
    return {KEY: asdict(fed)}


def read(config: Mapping[str, Any]) -> Input | None:
    """What such JSON says; ValueError if it can't be."""
    if (found := config.get(KEY)) is None:
        return None
    if not isinstance(found, dict) or found.keys() != {*NAMES}:
        raise ValueError(f"{KEY}: expected {', '.join(NAMES)}, found {found!r}")
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
    return Input(**values)


def enlarged(side: int, share: float) -> int:
    """Pixels of a picture's side of which a centred crop of `side` is the share, as nearly as is centred exactly.

    Libraries that resize pictures and then crop them round a border of half a pixel, which would shift the box.
    """
    return side + 2 * round(side * (1 / share - 1) / 2)
