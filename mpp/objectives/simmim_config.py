"""The settings of SimMIM."""

from dataclasses import dataclass
from typing import ClassVar

from mpp.objectives.hiding_config import HidingConfig, MaskName
from mpp.objectives.predicted_config import METRICS


@dataclass(frozen=True)
class SimMIMConfig(HidingConfig):
    """The defaults are the paper's (arXiv 2111.09886, section 4.1): units of 32 pixels are 2 x 2 patches of 16."""

    name: str = "simmim"
    mask: MaskName = "units"
    share: float = 0.6  # of the patches that are hidden, rounded up to whole units

    metrics: ClassVar = METRICS["pixels"]
    pictures: ClassVar = {
        "seen": "what the encoder is given (chequered: hidden)",
        "predicted": "what it paints into the hidden patches",
        "truth": "the image",
    }
