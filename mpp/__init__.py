"""mpp: masked patch pretraining of Vision Transformers.

The public names are resolved when they are first used, so that `mpp --help` imports no torch.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what type checkers and editors see; a test holds it equal to _HOMES
    from mpp import draws as draws
    from mpp import eval as eval
    from mpp import masks as masks
    from mpp import targets as targets
    from mpp.augment.config import AugmentConfig as AugmentConfig
    from mpp.augment.input import Input as Input
    from mpp.batch import Batch as Batch
    from mpp.data.config import ViewConfig as ViewConfig
    from mpp.data.read import read_shards as read_shards
    from mpp.eval.probes.protocols import PROTOCOLS as PROTOCOLS
    from mpp.eval.probes.task import Row as Row
    from mpp.export.convert import convert as convert
    from mpp.loop import train as train
    from mpp.models.decoder import Decoder as Decoder
    from mpp.models.decoder_config import DecoderConfig as DecoderConfig
    from mpp.models.encoder import Encoder as Encoder
    from mpp.models.encoder import PixelWarning as PixelWarning
    from mpp.models.encoder_config import EncoderConfig as EncoderConfig
    from mpp.models.encoders import ENCODERS as ENCODERS
    from mpp.models.layers import put as put
    from mpp.models.layers import take as take
    from mpp.models.presets import presets as presets
    from mpp.models.trunk import Trunk as Trunk
    from mpp.models.trunk_config import TrunkConfig as TrunkConfig
    from mpp.models.vit import ViT as ViT
    from mpp.models.vit_config import ViTConfig as ViTConfig
    from mpp.objectives import OBJECTIVES as OBJECTIVES
    from mpp.objectives import Metric as Metric
    from mpp.objectives import Needs as Needs
    from mpp.objectives import ObjectiveConfig as ObjectiveConfig
    from mpp.objectives.autoregressive import Autoregressive as Autoregressive
    from mpp.objectives.autoregressive_config import AutoregressiveConfig as AutoregressiveConfig
    from mpp.objectives.base import Objective as Objective
    from mpp.objectives.data2vec import Data2Vec as Data2Vec
    from mpp.objectives.data2vec_config import Data2VecConfig as Data2VecConfig
    from mpp.objectives.labels import Classification as Classification
    from mpp.objectives.labels_config import LabelsConfig as LabelsConfig
    from mpp.objectives.mae import MAE as MAE
    from mpp.objectives.mae_config import MAEConfig as MAEConfig
    from mpp.objectives.masked_patch import MaskedPatchPrediction as MaskedPatchPrediction
    from mpp.objectives.masked_patch_config import MaskedPatchConfig as MaskedPatchConfig
    from mpp.objectives.maskfeat import MaskFeat as MaskFeat
    from mpp.objectives.maskfeat_config import MaskFeatConfig as MaskFeatConfig
    from mpp.objectives.simmim import SimMIM as SimMIM
    from mpp.objectives.simmim_config import SimMIMConfig as SimMIMConfig
    from mpp.optim import Scale as Scale
    from mpp.ranks import together as together
    from mpp.recipe import load_recipe as load_recipe
    from mpp.train_config import LogConfig as LogConfig
    from mpp.train_config import TrainConfig as TrainConfig
    from mpp.weights import load_classifier as load_classifier
    from mpp.weights import load_encoder as load_encoder

_HOMES = {
    "ViT": "mpp.models.vit",
    "ViTConfig": "mpp.models.vit_config",
    "presets": "mpp.models.presets",
    "Batch": "mpp.batch",
    "Objective": "mpp.objectives.base",
    "ObjectiveConfig": "mpp.objectives",
    "Needs": "mpp.objectives",
    "Metric": "mpp.objectives",
    "Scale": "mpp.optim",
    "OBJECTIVES": "mpp.objectives",
    "Encoder": "mpp.models.encoder",
    "PixelWarning": "mpp.models.encoder",
    "Input": "mpp.augment.input",
    "EncoderConfig": "mpp.models.encoder_config",
    "ENCODERS": "mpp.models.encoders",
    "PROTOCOLS": "mpp.eval.probes.protocols",
    "Row": "mpp.eval.probes.task",
    "Trunk": "mpp.models.trunk",
    "TrunkConfig": "mpp.models.trunk_config",
    "Decoder": "mpp.models.decoder",
    "DecoderConfig": "mpp.models.decoder_config",
    "TrainConfig": "mpp.train_config",
    "LogConfig": "mpp.train_config",
    "MaskedPatchPrediction": "mpp.objectives.masked_patch",
    "MaskedPatchConfig": "mpp.objectives.masked_patch_config",
    "Autoregressive": "mpp.objectives.autoregressive",
    "AutoregressiveConfig": "mpp.objectives.autoregressive_config",
    "MAE": "mpp.objectives.mae",
    "MAEConfig": "mpp.objectives.mae_config",
    "SimMIM": "mpp.objectives.simmim",
    "SimMIMConfig": "mpp.objectives.simmim_config",
    "MaskFeat": "mpp.objectives.maskfeat",
    "MaskFeatConfig": "mpp.objectives.maskfeat_config",
    "Data2Vec": "mpp.objectives.data2vec",
    "Data2VecConfig": "mpp.objectives.data2vec_config",
    "Classification": "mpp.objectives.labels",
    "LabelsConfig": "mpp.objectives.labels_config",
    "AugmentConfig": "mpp.augment.config",
    "ViewConfig": "mpp.data.config",
    "take": "mpp.models.layers",
    "put": "mpp.models.layers",
    "load_recipe": "mpp.recipe",
    "train": "mpp.loop",
    "load_encoder": "mpp.weights",
    "load_classifier": "mpp.weights",
    "convert": "mpp.export.convert",
    "read_shards": "mpp.data.read",
    "together": "mpp.ranks",
    "draws": "mpp",
    "masks": "mpp",
    "targets": "mpp",
    "eval": "mpp",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        return importlib.metadata.version("mpp")
    if name not in _HOMES:
        raise AttributeError(f"mpp has no {name!r}; it has {', '.join(sorted(_HOMES))}")
    if _HOMES[name] == "mpp":
        return importlib.import_module(f"mpp.{name}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*_HOMES, "__version__"])
