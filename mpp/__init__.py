"""mpp: masked patch pretraining of Vision Transformers.

The public names are resolved when they are first used, so that `mpp --help` imports no torch.
"""

import importlib

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
    "TrainConfig": "mpp.train_config",
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
    "targets": "mpp",
    "eval": "mpp",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"mpp has no {name!r}; it has {', '.join(sorted(_HOMES))}")
    if _HOMES[name] == "mpp":
        return importlib.import_module(f"mpp.{name}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(_HOMES)
