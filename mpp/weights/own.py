"""This library's own files: safetensors, in whose metadata the encoder's config stands."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from mpp import budget, checkpoint, jsons
from mpp.augment.input import Input
from mpp.errors import cause, shown
from mpp.files import write_atomically
from mpp.finite import all_finite, broken, of_kind, same_kind
from mpp.models.classifier import Classifier, Head
from mpp.models.encoder import Encoder, fill
from mpp.models.encoder_config import EncoderConfig
from mpp.models.encoders import ENCODERS, build_encoder, facts_of
from mpp.weights.files import WeightsError


def fingerprint(encoder: Encoder, beside: Mapping[str, Tensor] = {}) -> str:
    """A digest of an encoder's tensors, which tells it from one trained anew, whatever file it came from.

    beside: further tensors that a run starts from.
    """
    digest = hashlib.sha256()
    for name, tensor in [*sorted(encoder.state_dict().items()), *sorted(beside.items())]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def save_result(module: nn.Module, path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes what a run leaves: a classifier, an encoder, or the tensors of anything else.

    tensors: the module's own may be split among processes, and these are whole.
    """
    if isinstance(module, Classifier):
        save_classifier(module, path, tensors)
    elif isinstance(module, Encoder):
        save_encoder(module, path, tensors)
    else:  # copies, as tensors that share their memory would be refused
        write_atomically(path, save({name: tensor.clone() for name, tensor in tensors.items()}))


def save_encoder(encoder: Encoder, path: Path, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Writes an encoder with its config, whole or not at all; FileError on a full disk."""
    _save(tensors or encoder.state_dict(), path, {"encoder": jsons.text(facts_of(encoder))})


def save_classifier(classifier: Classifier, path: Path, tensors: Mapping[str, Tensor] | None = None) -> None:
    """The same for an encoder with its head; the names of its classes stand beside the config.

    In one entry of metadata: safetensors writes several in random order, and equal runs are to leave equal files.
    """
    facts = facts_of(classifier.encoder) | {"classes": classifier.classes}
    _save(tensors or classifier.state_dict(), path, {"encoder": jsons.text(facts)})


def _save(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    write_atomically(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))


def find(path: Path, *names: str) -> Path | None:
    """The file of ours that a path means, or None if it means another's: in a folder the first of `names` there is.

    A run folder that is not at its end has its newest checkpoint's; those with a running average come first.
    """
    try:
        return _find(path, names)
    except OSError as error:
        raise WeightsError(f"{shown(error.filename or path)}: cannot be read: {cause(error)}") from error


def _find(path: Path, names: Sequence[str]) -> Path | None:
    if not path.is_dir():
        return path if _metadata(path).get("encoder") else None
    os.listdir(path)  # globbing finds nothing in a folder that may not be read, and says nothing
    saved = [path / f"checkpoints/step-{step:08d}" for step in reversed(checkpoint.steps(path / "checkpoints"))]
    for file in (place / name for place in (path, *saved) for name in names):
        # Another library's folder may hold a file of such a name.
        if file.exists() and (file.parent != path or _metadata(file, True).get("encoder")):
            return file
    return None


def load_encoder(path: Path) -> Encoder:
    """The encoder of a file; of a classifier's or an objective's its encoder. WeightsError names the file."""
    metadata, tensors = _read(path)
    encoder = _built(metadata, path)
    # In a checkpoint the encoder is a part of the objective; in a classifier's file too, always by the same name.
    place = _facts(metadata).get("place", "encoder.")
    prefix = place if any(name.startswith(place) for name in tensors) else ""
    found = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    _fill(encoder, found, path)
    return encoder


def load_classifier(path: Path) -> Classifier:
    """The classifier of a file. WeightsError names the file."""
    metadata, tensors = _read(path)
    encoder = _built(metadata, path)
    classes = _facts(metadata).get("classes")
    if not isinstance(classes, list) or not classes:
        raise WeightsError(f"{path}: holds no classifier of mpp (its metadata names no classes)")
    classes = [str(name) for name in classes]
    hidden = len(tensors["head.hidden.bias"]) if "head.hidden.bias" in tensors else 0
    with torch.device("meta"):
        classifier = Classifier(encoder, Head(encoder.width, len(classes), hidden), classes)
    _fill(classifier, tensors, path)
    return classifier


def _metadata(path: Path, must: bool = False) -> dict[str, str]:
    """The metadata of a safetensors file; {} for any other, or an error if it `must` be one."""
    try:
        budget.check_safetensors(path)
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError, budget.Overrun) as error:
        if must:
            raise WeightsError(f"{path}: not readable as weights ({cause(error)})") from error
        return {}


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        return _metadata(path, True), load_file(path)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path}: not readable as weights ({error})") from error


def _facts(metadata: dict[str, str]) -> dict[str, Any]:
    """What the metadata says of the encoder; ValueError if that is no JSON object."""
    facts = budget.json_of(metadata["encoder"])
    if not isinstance(facts, dict):
        raise ValueError(f"a JSON object was expected, found {type(facts).__name__}")
    return facts


def _built(metadata: dict[str, str], path: Path) -> Encoder:
    if "encoder" not in metadata:
        raise WeightsError(f"{path}: holds no encoder of mpp (its metadata has no 'encoder')")
    try:
        values = _facts(metadata)
        name, origin = values.get("name", "vit"), values.get("import")
        if origin and name not in ENCODERS:
            raise WeightsError(
                f"{path}: its encoder {shown(name)} comes from --import {shown(origin)}; import that first"
            )
        kind = ENCODERS[name].config
        names = {field.name for field in fields(kind)}
        known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in names}
        config = kind(**known)
        fed = _input(values.get("input"), config)
        with torch.device("meta"):  # what a file claims costs no memory before its tensors are seen to be there
            encoder = build_encoder(config)
        encoder.input = fed
        return encoder
    except WeightsError:
        raise
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError, ArithmeticError) as error:
        raise WeightsError(f"{path}: its encoder's config does not fit ({error})") from error


def _input(found: Any, config: EncoderConfig) -> Input:
    """What a file says that its encoder is fed; ValueError if that is nothing, or nothing that goes with the config."""
    if not isinstance(found, dict):
        raise ValueError("no 'input', what it is fed: a file of an earlier version of mpp; train or convert it again")
    known: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}
    fed = Input(**known)
    config.check_image(fed.image)
    return fed


def _fill(module: nn.Module, found: dict[str, Tensor], path: Path) -> None:
    expected = module.state_dict()
    wrong = sorted(expected.keys() ^ found.keys())
    wrong += [name for name in expected.keys() & found.keys() if expected[name].shape != found[name].shape]
    if wrong:
        raise WeightsError(f"{path}: {', '.join(map(shown, wrong[:5]))} missing, unexpected or of another shape")
    if other := [name for name in expected if not same_kind(found[name], expected[name])]:
        raise WeightsError(f"{path}: {other[0]}: {of_kind(found[other[0]])}")
    fill(module, found)
    for name, tensor in module.state_dict().items():  # in float32, which has no room for some numbers of float64
        if not all_finite(tensor):
            raise WeightsError(f"{path}: {name}: {broken(tensor)}; restore the file, or take an earlier one")
