"""With what settings a folder's training began: began.json beside the checkpoints, written before the first of them."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mpp import checkpoint, jsons
from mpp.data.subset import digest, label_digest
from mpp.differing import computed, differing
from mpp.errors import cause
from mpp.files import sealed, unsealed, write_atomically
from mpp.objectives.base import Objective
from mpp.shards.index import Index
from mpp.train_config import Execution, TrainConfig

FILE = "began.json"
FORMAT = 1
CHOSEN = tuple(f"train.{name}" for name in Execution.__dataclass_fields__)  # what the machine may choose

CONTENT = ("images", "labels")


def settings_of(objective: Objective, batches: object, config: TrainConfig, seed: int) -> dict[str, Any]:
    """What decides what a training computes, in plain values by dotted key; images are known by their content."""
    parts = {"seed": seed, "objective": asdict(objective.config), "model": asdict(objective.encoder.config)}
    index = getattr(batches, "index", None)
    if isinstance(index, Index):
        parts["images"] = digest(index)
        parts["labels"] = label_digest(index) if objective.needs.labels else None
    return json.loads(jsons.text(computed({**parts, "train": asdict(config)}), default=str))


def same(folder: Path, settings: Mapping[str, Any], config: TrainConfig, execution: Execution | None) -> TrainConfig:
    """The config with what the machine chose when the training below `folder` began, if one did and has saved.

    execution: where the caller has chosen already, and by itself knows whether that is as it was.
    Raises CheckpointError, one line, if it began with other settings.
    """
    path = folder / FILE
    if not path.exists() or not checkpoint.steps(folder):
        return config
    try:
        facts = unsealed(path)
        if facts["format"] != FORMAT:
            raise ValueError(f"format {facts['format']}, expected {FORMAT}")
        there: dict[str, Any] = {**facts["settings"]}
        chosen = {key: there[key] for key in CHOSEN if settings[key] in (None, "auto")}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise checkpoint.CheckpointError(f"{path}: cut, or not as it was written ({cause(error)})") from None
    here = {**settings, **chosen}
    # Batches that do not say what they are of, and what is the caller's.
    for key in ({*CONTENT} - (there.keys() & here.keys())) | {*(CHOSEN if execution else ())}:
        there.pop(key, None)
        here.pop(key, None)
    if changed := differing(there, here):
        raise checkpoint.CheckpointError(
            f"{folder.parent}: holds a training with other settings ({'; '.join(changed)}); choose another folder"
        )
    return replace(config, **{key.removeprefix("train."): value for key, value in chosen.items()})


def write(folder: Path, settings: Mapping[str, Any], execution: Execution) -> None:
    """Says with what a training began."""
    chosen = {f"train.{name}": value for name, value in asdict(execution).items()}
    plain = {
        key: chosen[key] if key in chosen and value in (None, "auto") else value for key, value in settings.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / FILE, sealed({"format": FORMAT, "settings": plain}))
