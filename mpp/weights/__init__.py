"""Weights in and out: one file a format. `load_encoder` recognises what a path holds."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from mpp import checkpoint
from mpp.errors import UserError
from mpp.files import write_atomically
from mpp.models.vit import ViT, ViTConfig


class WeightsError(UserError):
    """A file of weights is not there, not whole or not of a kind this library knows."""


def save_encoder(encoder: ViT, path: Path) -> None:
    """Writes an encoder with its config, whole or not at all; FileError on a full disk."""
    tensors = {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}
    write_atomically(path, save(tensors, {"encoder": json.dumps(asdict(encoder.config))}))


def load_encoder(path: str | Path) -> ViT:
    """Loads an encoder from a run folder, a checkpoint folder or an `encoder.safetensors`, in float32 on the CPU.

    Of a run that is not at its end, the last checkpoint counts, and of one with a running average that average.
    Nothing in a file is run. Raises WeightsError, one line that names the file.
    """
    path = Path(path)
    if path.is_dir():
        path = _file_in(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path}: not readable as weights ({error})") from error
    if "encoder" not in metadata:
        raise WeightsError(f"{path}: holds no encoder of mpp (its metadata has no 'encoder')")
    encoder = ViT(_config(metadata["encoder"], path))
    prefix = "encoder." if path.name != "encoder.safetensors" and any(k.startswith("encoder.") for k in tensors) else ""
    found = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    expected = encoder.state_dict()
    wrong = sorted(expected.keys() ^ found.keys())
    wrong += [name for name in expected.keys() & found.keys() if expected[name].shape != found[name].shape]
    if wrong:
        raise WeightsError(f"{path}: {', '.join(wrong[:5])} missing, unexpected or of another shape")
    encoder.load_state_dict(found)
    return encoder


def _file_in(folder: Path) -> Path:
    """The file that holds the weights of a run folder or checkpoint folder."""
    saved = [folder / f"checkpoints/step-{step:08d}" for step in reversed(checkpoint.steps(folder / "checkpoints"))]
    names = ("encoder.safetensors", "ema.safetensors", "model.safetensors")
    for path in (place / name for place in (folder, *saved) for name in names):
        if path.exists():
            return path
    raise WeightsError(f"{folder}: holds neither encoder.safetensors nor a checkpoint")


def _config(text: str, path: Path) -> ViTConfig:
    try:
        values = json.loads(text)
        names = {field.name for field in fields(ViTConfig)}
        known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in names}
        return ViTConfig(**known)
    except (ValueError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path}: its encoder's config does not fit ({error})") from error
