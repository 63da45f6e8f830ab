"""Weights in and out: one file a format. `load_encoder` recognises what a path holds."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from mpp import checkpoint
from mpp.errors import UserError
from mpp.files import write_atomically
from mpp.models.classifier import Classifier, Head
from mpp.models.encoder import Encoder
from mpp.models.encoders import ENCODERS, build_encoder


class WeightsError(UserError):
    """A file of weights is not there, not whole or not of a kind this library knows."""


def save_encoder(encoder: Encoder, path: Path) -> None:
    """Writes an encoder with its config, whole or not at all; FileError on a full disk."""
    _save(encoder, path, {"encoder": json.dumps(asdict(encoder.config))})


def save_classifier(classifier: Classifier, path: Path) -> None:
    """The same for an encoder with its head; the names of its classes stand beside the config.

    In one entry of metadata: safetensors writes several in random order, and equal runs are to leave equal files.
    """
    config = asdict(classifier.encoder.config) | {"classes": classifier.classes}
    _save(classifier, path, {"encoder": json.dumps(config)})


def _save(module: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
    write_atomically(path, save(tensors, metadata))


def load_encoder(path: str | Path) -> Any:
    """Loads an encoder from a run folder, a checkpoint folder or an `encoder.safetensors`, in float32 on the CPU.

    Of a run that is not at its end, the last checkpoint counts, and of one with a running average that average. A
    `classifier.safetensors` gives its encoder. Nothing in a file is run. Raises WeightsError, one line that names the
    file.
    """
    path = Path(path)
    if path.is_dir():
        path = _file_in(path)
    metadata, tensors = _read(path)
    encoder = _built(metadata, path)
    prefix = "encoder." if any(name.startswith("encoder.") for name in tensors) else ""
    found = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    _fill(encoder, found, path)
    return encoder


def load_classifier(path: str | Path) -> Classifier:
    """Loads what a finished run of training with labels left in its folder, or its `classifier.safetensors`.

    Raises WeightsError, one line that names the file.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "classifier.safetensors").exists():
            raise WeightsError(f"{path}: holds no classifier.safetensors, which a finished run with labels leaves")
        path = path / "classifier.safetensors"
    metadata, tensors = _read(path)
    encoder = _built(metadata, path)
    classes = json.loads(metadata["encoder"]).get("classes")
    if not isinstance(classes, list) or not classes:
        raise WeightsError(f"{path}: holds no classifier of mpp (its metadata names no classes)")
    classes = [str(name) for name in classes]
    hidden = len(tensors["head.hidden.bias"]) if "head.hidden.bias" in tensors else 0
    classifier = Classifier(encoder, Head(encoder.width, len(classes), hidden), classes)
    _fill(classifier, tensors, path)
    return classifier.eval()


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return metadata, load_file(path)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path}: not readable as weights ({error})") from error


def _built(metadata: dict[str, str], path: Path) -> Encoder:
    if "encoder" not in metadata:
        raise WeightsError(f"{path}: holds no encoder of mpp (its metadata has no 'encoder')")
    try:
        values = json.loads(metadata["encoder"])
        _, kind = ENCODERS[values.get("name", "vit")]
        names = {field.name for field in fields(kind)}
        known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in names}
        return build_encoder(kind(**known))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise WeightsError(f"{path}: its encoder's config does not fit ({error})") from error


def _fill(module: nn.Module, found: dict[str, Tensor], path: Path) -> None:
    expected = module.state_dict()
    wrong = sorted(expected.keys() ^ found.keys())
    wrong += [name for name in expected.keys() & found.keys() if expected[name].shape != found[name].shape]
    if wrong:
        raise WeightsError(f"{path}: {', '.join(wrong[:5])} missing, unexpected or of another shape")
    module.load_state_dict(found)


def _file_in(folder: Path) -> Path:
    """The file that holds the weights of a run folder or checkpoint folder."""
    saved = [folder / f"checkpoints/step-{step:08d}" for step in reversed(checkpoint.steps(folder / "checkpoints"))]
    names = ("encoder.safetensors", "ema.safetensors", "model.safetensors")
    for path in (place / name for place in (folder, *saved) for name in names):
        if path.exists():
            return path
    raise WeightsError(f"{folder}: holds neither encoder.safetensors nor a checkpoint")
