"""The kinds of encoder by the name that recipes give them. A new kind is one file here and one line in ENCODERS."""

from typing import Any

from mpp.models.cnn import ResNet, ResNetConfig
from mpp.models.encoder import Encoder, EncoderConfig
from mpp.models.vit import ViT
from mpp.models.vit_config import ViTConfig

ENCODERS: dict[str, tuple[type[Encoder], type[EncoderConfig]]] = {
    "resnet": (ResNet, ResNetConfig),
    "vit": (ViT, ViTConfig),
}


def build_encoder(config: Any) -> Encoder:
    """The encoder that a config describes, freshly initialised."""
    return ENCODERS[config.name][0](config)
