"""The settings of masked feature prediction."""

from dataclasses import dataclass
from typing import ClassVar

from mpp.objectives.config import Metric
from mpp.objectives.hiding_config import HidingConfig, MaskName


@dataclass(frozen=True)
class MaskFeatConfig(HidingConfig):
    """The defaults are the paper's for images (arXiv 2112.09133, section 4.3 and appendix), of patches of 16 pixels."""

    name: str = "maskfeat"
    mask: MaskName = "blocks"
    share: float = 0.4  # of the patches that are hidden
    cell: int = 8  # side of what has a histogram of its own, pixels
    bins: int = 9  # of a histogram
    window: int | None = None  # side of the Gaussian by which gradients are weighed; two cells where not given, 0: none

    metrics: ClassVar = {
        "cosine": Metric("Cosine of predicted and true histograms"),
        "average": Metric("Guess without learning: the batch's average histogram", guess=True),
    }
    pictures: ClassVar = {
        "seen": "what the encoder is given (chequered: hidden)",
        "predicted": "histograms as strokes along edges, each colour's in its own: predicted in the hidden patches",
        "truth": "true histograms everywhere",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cell < 1:
            raise ValueError(f"objective.cell must be at least 1 pixel, got {self.cell}")
        if not 2 <= self.bins <= 360:
            raise ValueError(f"objective.bins must be 2 to 360, got {self.bins}")
        if self.window is not None and (self.window < 0 or self.window == 1):
            raise ValueError(f"objective.window must be 0 for none, or at least 2 pixels, got {self.window}")
