"""The settings of masked autoencoding."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from mpp.models.decoder_config import DecoderConfig
from mpp.objectives.config import Needs
from mpp.objectives.hiding_config import HidingConfig
from mpp.objectives.predicted_config import DECIBELS, FILLED_IN


@dataclass(frozen=True)
class MAEConfig(HidingConfig):
    """The defaults are the paper's for ImageNet (arXiv 2111.06377, appendix A.1)."""

    takes_decoder: ClassVar = True

    name: str = "mae"
    share: float = 0.75  # of the patches that are dropped; what is left is rounded down
    normalised: bool = True  # each patch's pixels less their mean, divided by their deviation
    decoder: DecoderConfig = field(default_factory=DecoderConfig)

    adjustable = ("mask", "share", "normalised", "decoder.dropout", "decoder.drop_path")
    up: ClassVar[bool] = True
    metrics: ClassVar = DECIBELS

    @property
    def needs(self) -> Needs:
        return Needs(drops_patches=True)

    @property
    def pictures(self) -> Mapping[str, str]:  # type: ignore[override]  # they follow from the settings
        filled = f"; {FILLED_IN}" if self.normalised else ""
        return {
            "seen": "what the encoder is given (chequered: dropped)",
            "predicted": f"what the decoder paints into the dropped patches{filled}",
            "truth": "the image",
        }
