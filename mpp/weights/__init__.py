"""Weights in and out: one file a format. `load_encoder` and `load_classifier` recognise what a path holds."""

import logging
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpp.errors import shown
from mpp.models.classifier import Classifier
from mpp.models.encoder import Encoder
from mpp.weights import fed, foreign, own
from mpp.weights.decoder import DecoderFile
from mpp.weights.files import WeightsError
from mpp.weights.format import joint
from mpp.weights.own import fingerprint, save_classifier, save_encoder, save_result

__all__ = [
    "Start",
    "WeightsError",
    "fingerprint",
    "load_classifier",
    "load_encoder",
    "load_start",
    "save_classifier",
    "save_encoder",
    "save_result",
]

ENCODER = ("encoder.safetensors", "ema.safetensors", "model.safetensors")  # the last two in checkpoints
CLASSIFIER = ("classifier.safetensors",)

logger = logging.getLogger("mpp.weights")


@dataclass(frozen=True)
class Start:
    """What a run starts from."""

    encoder: Encoder
    decoder: DecoderFile | None = None  # MAE's, where it was asked for and there is one

    @property
    def fingerprint(self) -> str:
        """A digest of all of it."""
        return fingerprint(self.encoder, self.decoder.tensors if self.decoder else {})


def load_encoder(path: str | Path, **facts: Any) -> Encoder:
    """Loads an encoder, in float32 on the CPU and eval mode: this library's, or one that others published.

    path: a run folder, a checkpoint folder, an `encoder.safetensors` or a `classifier.safetensors`; Google's or
        big_vision's `.npz`; a file or folder of timm, Hugging Face, MAE, DINO, DINOv2 or CAPI (docs/weights.md).
    facts: what the encoder is to be fed, named as in `mpp.Input`: for `image=224` or `image=(96, 128)`, which its patch
        divides, positions are resampled as the format does it. What another's file can't tell, named as in ViTConfig:
        `heads=2`, `mean=...`; and where it holds several models, `prefix=`, what the names of the wanted tensors begin
        with.

    Of a run that is not at its end, the last checkpoint counts, and of one with a running average that average. Nothing
    in a file is run. Raises WeightsError, one line that names the file. Tensors of the file that are no part of the
    encoder, such as a decoder's, are named in the encoder's `left_aside`.
    """
    path = Path(path)
    if found := own.find(path, *ENCODER, *CLASSIFIER):
        return fed.fed(own.load_encoder(found), _asked(found, facts), path).eval()
    return _foreign(path, facts).encoder.eval()


def load_start(path: str | Path, *, decoder: bool) -> Start:
    """What a run starts from: an encoder, as by `load_encoder`, and the decoder that MAE has beside it, if asked for.

    Of mpp's own files it is the encoder alone. Where no decoder is found, that is said.
    """
    path, found = Path(path), None
    if not decoder or own.find(path, *ENCODER, *CLASSIFIER):
        encoder = load_encoder(path)
    else:
        read = foreign.read(path, {})
        found = read.decoder if read.decoder and read.decoder.tensors else None
        encoder = _said(path, read, found.tensors if found else {}).encoder.eval()
    if decoder and found is None:
        logger.info("%s: holds no decoder beside its encoder; that of the objective starts anew", shown(path))
    return Start(encoder, found)


def load_classifier(path: str | Path, **facts: Any) -> Classifier:
    """Loads a classifier: what training with labels left, or a model with a head that others published.

    path, facts: as in `load_encoder`; of a run folder its `classifier.safetensors` is meant. Where a file does not name
    its classes they are called "0", "1", and so on. Raises WeightsError, one line that names the file.
    """
    path = Path(path)
    if found := own.find(path, *CLASSIFIER):
        asked, classifier = _asked(found, facts), own.load_classifier(found)
        return Classifier(fed.fed(classifier.encoder, asked, path), classifier.head, classifier.classes).eval()
    if own.find(path, *ENCODER):
        raise WeightsError(f"{path}: holds no classifier.safetensors, which a finished run with labels leaves")
    read = _foreign(path, facts)
    if read.head is None:
        beside = f" (left aside: {', '.join(map(shown, read.aside[:3]))})" if read.aside else ""
        raise WeightsError(f"{shown(path)}: {read.format}: holds an encoder without a head for classes{beside}")
    if read.classes == joint(len(read.classes)):
        what = "CLIP's projection to the space of images and texts: its numbers are no scores of classes"
        logger.info("%s: %s: the head is %s", shown(path), read.format, what)
    return Classifier(read.encoder, read.head, read.classes).eval()


def _foreign(path: Path, facts: dict[str, Any]) -> foreign.Foreign:
    return _said(path, foreign.read(path, facts))


def _said(path: Path, read: foreign.Foreign, taken: Container[str] = ()) -> foreign.Foreign:
    """What was read, after a line about all that is left aside of it, but for what is taken."""
    if aside := [name for name in read.aside if name not in taken]:
        some = ", ".join(map(shown, aside[:3])) + (", ..." if len(aside) > 3 else "")
        logger.info("%s: %s: left aside %d of its parts: %s", shown(path), read.format, len(aside), some)
    read.encoder.left_aside = read.aside
    return read


def _asked(path: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """What the encoder of a file of ours is to be fed; all else it says itself."""
    told, asked = fed.apart(path, facts)
    if told:
        raise WeightsError(f"{path}: says everything about its encoder itself; {', '.join(told)} can't be given")
    return asked
