"""What an encoder can be trained for, by the name that recipes give it. docs/extending.md adds one.

Settings stand in modules without torch (`*_config.py`), so that a misspelt key is named at once.
"""

from typing import TYPE_CHECKING, Any

from mpp.extend import Kind, Table
from mpp.objectives.autoregressive_config import AutoregressiveConfig
from mpp.objectives.config import Metric, Needs, ObjectiveConfig
from mpp.objectives.data2vec_config import Data2VecConfig
from mpp.objectives.labels_config import LabelsConfig
from mpp.objectives.mae_config import MAEConfig
from mpp.objectives.masked_patch_config import MaskedPatchConfig
from mpp.objectives.maskfeat_config import MaskFeatConfig
from mpp.objectives.simmim_config import SimMIMConfig

if TYPE_CHECKING:
    from mpp.objectives.base import Objective

OBJECTIVES: Table[Kind] = Table(
    "objective",
    "mpp.objectives",
    Kind,
    {
        "autoregressive": Kind(AutoregressiveConfig, "mpp.objectives.autoregressive:Autoregressive"),
        "data2vec": Kind(Data2VecConfig, "mpp.objectives.data2vec:Data2Vec"),
        "labels": Kind(LabelsConfig, "mpp.objectives.labels:Classification"),
        "mae": Kind(MAEConfig, "mpp.objectives.mae:MAE"),
        "maskfeat": Kind(MaskFeatConfig, "mpp.objectives.maskfeat:MaskFeat"),
        "mpp": Kind(MaskedPatchConfig, "mpp.objectives.masked_patch:MaskedPatchPrediction"),
        "simmim": Kind(SimMIMConfig, "mpp.objectives.simmim:SimMIM"),
    },
)

__all__ = ["OBJECTIVES", "Metric", "Needs", "ObjectiveConfig", "build_objective"]


def build_objective(encoder: Any, config: ObjectiveConfig) -> "Objective":
    """The objective that a config describes, around an encoder that has the weights it starts from."""
    return OBJECTIVES[config.name].make(encoder, config)
