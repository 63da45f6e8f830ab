"""What a probe is given, by anybody: features and labels that can be meant, and which images each label has."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

LARGEST = 10**6  # a label from here on is an identifier, not a class (mpp/shards/labels.py has the same)
WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
Parts = Mapping[str, Sequence[Tensor]]  # choice -> features that stand side by side


def check_given(train: Tensor | Parts, train_labels: Tensor, test: Tensor | Parts, test_labels: Tensor) -> None:
    """Raises ValueError, one line, unless features are finite numbers (n, d) and labels whole numbers (n,) from 0 on.

    Labels of test images that no training image has are allowed: they are never guessed.
    """
    parts = {"train": _parts(train), "test": _parts(test)}
    if list(parts["train"]) != list(parts["test"]):
        raise ValueError(
            f"test features are {_names(parts['test'])}; expected those of train: {_names(parts['train'])}"
        )
    for (name, split), labels in zip(parts.items(), (train_labels, test_labels), strict=True):
        images = _check_labels(name, labels)
        for choice, tensors in split.items():
            place = f"{name} features{f' {choice!r}' if choice else ''}"
            for number, features in enumerate(tensors):
                beside = parts["train"][choice]
                _check_features(place, features, images, beside[number] if number < len(beside) else None)
            if len(tensors) != len(parts["train"][choice]):
                raise ValueError(f"{place}: {len(tensors)} parts, expected {len(parts['train'][choice])} as train has")


def check_above(name: str, value: float, least: float = 0.0) -> None:
    """Raises ValueError for a setting that is no finite number above `least`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least < value < math.inf:
        raise ValueError(f"{name} must be a number above {least:g}, got {value!r}")


def by_label(labels: Tensor) -> list[tuple[int, np.ndarray]]:
    """Each label that occurs, rising, with the images that have it, in order; no label looks at all images."""
    values = labels.cpu().numpy()
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.diff(values[order], prepend=-1))
    return [(int(values[rows[0]]), rows) for rows in np.split(order, starts[1:])] if len(order) else []


def _parts(features: Tensor | Parts) -> Parts:
    return features if isinstance(features, Mapping) else {"": [features]}


def _names(parts: Parts) -> str:
    return ", ".join(parts) or "one tensor"


def _check_labels(name: str, labels: Tensor) -> int:
    """How many there are."""
    if not isinstance(labels, Tensor):
        raise ValueError(f"{name} labels must be a torch tensor of whole numbers (n,), got {type(labels).__name__}")
    if labels.dtype not in WHOLE or labels.ndim != 1 or not len(labels):
        found = f"{str(labels.dtype).removeprefix('torch.')} of shape {tuple(labels.shape)}"
        raise ValueError(f"{name} labels must be whole numbers (int64) of shape (n,), at least one, got {found}")
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0:
        none = " (no label: leave such images out)" if lowest == -1 else ""
        raise ValueError(f"{name} labels must be at least 0, got {lowest}{none}")
    if highest >= LARGEST:
        raise ValueError(f"{name} labels must be below {LARGEST}, got {highest}, which numbers no class")
    return len(labels)


def _check_features(place: str, features: Tensor, images: int, like: Tensor | None) -> None:
    if not isinstance(features, Tensor):
        raise ValueError(f"{place} must be a torch tensor (n, d), got {type(features).__name__}")
    if features.ndim != 2 or len(features) != images or not features.shape[1]:
        raise ValueError(f"{place} must be of shape ({images}, d), one row a label, got {tuple(features.shape)}")
    if features.dtype == torch.bool or features.is_complex():
        raise ValueError(f"{place} must be real numbers, got {str(features.dtype).removeprefix('torch.')}")
    if isinstance(like, Tensor) and like.ndim == 2 and features.shape[1] != like.shape[1]:
        raise ValueError(f"{place} have {features.shape[1]} numbers an image, expected {like.shape[1]} as train has")
    if features.is_floating_point() and not features.isfinite().all():
        row = int((~features.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"{place} must be finite, got {features[row][~features[row].isfinite()][0]:g} in row {row}")
