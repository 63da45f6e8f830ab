"""What an encoder can be trained for. A new objective is one file here, one line in OBJECTIVES, a recipe and a test."""

from collections.abc import Callable
from typing import Any

from mpp.objectives.base import Objective, ObjectiveConfig
from mpp.objectives.labels import Classification, LabelsConfig
from mpp.objectives.masked_patch import MaskedPatchConfig, MaskedPatchPrediction

# name in a recipe -> (the objective, made from an encoder and its settings; the settings)
OBJECTIVES: dict[str, tuple[Callable[[Any, Any], Objective], type[ObjectiveConfig]]] = {
    "labels": (Classification, LabelsConfig),
    "mpp": (MaskedPatchPrediction, MaskedPatchConfig),
}

__all__ = ["OBJECTIVES", "Objective", "ObjectiveConfig"]
