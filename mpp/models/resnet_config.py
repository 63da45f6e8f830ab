"""The shape of a CNN. No torch: recipes are checked without it."""

from dataclasses import dataclass
from typing import Literal

from mpp.models.encoder_config import EncoderConfig


@dataclass(frozen=True)
class ResNetConfig(EncoderConfig):
    """The shape of a CNN. The defaults are torchvision's resnet50."""

    name: str = "resnet"
    depth: Literal[18, 34, 50, 101] = 50  # layers with weights
    width: int = 64  # channels of the first stage; each later one has twice as many, and Bottleneck's output 4 times
    stem: Literal["imagenet", "small"] = "imagenet"  # small, for images up to 64 pixels: 3x3, no stride, no pooling
    # group: with weight standardisation, as the ViT paper's baseline ResNet (BiT); no image sees others of its batch
    norm: Literal["batch", "group"] = "batch"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.width <= 10**4:
            raise ValueError(f"model.width must be 1 to {10**4}, got {self.width}")

    def describe(self) -> str:
        return f"ResNet-{self.depth}, width {self.width}, {self.norm} norm"
