"""The kinds of encoder by the name that recipes give them. docs/extending.md adds one.

Settings stand in modules without torch (`*_config.py`), so that a misspelt key is named at once.
"""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mpp.extend import Kind, Table
from mpp.models.encoder_config import EncoderConfig
from mpp.models.resnet_config import ResNetConfig
from mpp.models.vit_config import ViTConfig

if TYPE_CHECKING:
    from mpp.models.encoder import Encoder

ENCODERS: Table[Kind] = Table(
    "encoder",
    "mpp.encoders",
    Kind,
    {
        "resnet": Kind(ResNetConfig, "mpp.models.cnn:ResNet"),
        "vit": Kind(ViTConfig, "mpp.models.vit:ViT"),
    },
)


def build_encoder(config: EncoderConfig) -> "Encoder":
    """The encoder that a config describes, freshly initialised."""
    return ENCODERS[config.name].make(config)


def facts_of(encoder: "Encoder") -> dict[str, Any]:
    """What a file of weights says of its encoder: config, what it is fed, and by which import its kind came, if any."""
    origin = ENCODERS.origin(encoder.config.name)
    return asdict(encoder.config) | {"input": asdict(encoder.input)} | ({"import": origin} if origin else {})
