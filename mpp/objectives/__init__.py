"""What an encoder can be trained for. A new objective is one file here, one line in OBJECTIVES, a recipe and a test."""

from mpp.objectives.base import Objective, ObjectiveConfig
from mpp.objectives.masked_patch import MaskedPatchConfig, MaskedPatchPrediction

# name in a recipe -> (the objective, its settings)
OBJECTIVES: dict[str, tuple[type[Objective], type[ObjectiveConfig]]] = {
    "mpp": (MaskedPatchPrediction, MaskedPatchConfig),
}

__all__ = ["OBJECTIVES", "Objective", "ObjectiveConfig"]
