"""The settings of masked autoencoding."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

from mpp.errors import counted
from mpp.models.decoder_config import DecoderConfig
from mpp.objectives.config import Metric, Needs, ObjectiveConfig

NEARLY = 1e-6  # patches: what floats may lack of a whole one, as 10 * (1 - 0.9) does


@dataclass(frozen=True)
class MAEConfig(ObjectiveConfig):
    """The defaults are the paper's for ImageNet (arXiv 2111.06377, appendix A.1)."""

    takes_decoder: ClassVar = True

    name: str = "mae"
    share: float = 0.75  # of the patches that are dropped; what is left is rounded down
    normalised: bool = True  # each patch's pixels less their mean, divided by their deviation
    decoder: DecoderConfig = field(default_factory=DecoderConfig)

    adjustable = ("share", "normalised", "decoder.dropout", "decoder.drop_path")
    metrics: ClassVar = {
        "psnr": Metric("Peak signal to noise of the predicted pixels, dB"),
        "flat": Metric("Guess without learning, dB: each patch's own mean", guess=True),
    }
    pictures: ClassVar = {
        "seen": "what the encoder is given (grey: dropped)",
        "predicted": "what the decoder paints into the dropped patches; with objective.normalised each gets its true "
        "mean and contrast, which are not predicted",
        "truth": "the image",
    }

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"objective.share must be in (0, 1), got {self.share}")

    @property
    def needs(self) -> Needs:
        return Needs(drops_patches=True)

    def kept(self, patches: int) -> int:
        """How many of an image's patches the encoder sees; ValueError where that is none, or all."""
        kept = math.floor(patches * (1 - self.share) + NEARLY)
        if not 0 < kept < patches:
            left = "none to be seen" if not kept else "none to be predicted"
            raise ValueError(f"objective.share {self.share} of {counted(patches, 'patch', 'patches')} leaves {left}")
        return kept
