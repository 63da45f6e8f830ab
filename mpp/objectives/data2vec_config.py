"""The settings of data2vec for images."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from mpp.objectives.config import Metric
from mpp.objectives.hiding_config import HidingConfig, MaskName


@dataclass(frozen=True)
class Data2VecConfig(HidingConfig):
    """The defaults are those of ViT-B (arXiv 2202.03555; facebookresearch/data2vec_vision, beit/README.md)."""

    name: str = "data2vec"
    mask: MaskName = "blocks"
    share: float = 0.6  # of the patches that are hidden; 120 of 196 in the authors' command
    top: int = 6  # blocks, the teacher's last, whose outputs are averaged
    beta: float = (
        2.0  # of the smooth L1 loss: a smaller error is squared and divided by twice this, a larger one is not
    )
    momentum: tuple[float, float] = (0.9998, 0.9998)  # of the teacher, at the start and when `rise` of the run is done
    rise: float = 1.0  # share of the run in which the momentum goes from the one to the other, in a line
    result: Literal["student", "teacher"] = "student"  # the encoder that is kept; the authors fine-tune the student

    adjustable = (*HidingConfig.adjustable, "top", "beta", "momentum", "rise", "result")
    metrics: ClassVar = {
        "spread": Metric("Deviation of the teacher's targets between images (0: the same of all, a collapse)"),
        "predicted": Metric("Deviation of predictions between images"),
        "mean": Metric("Loss of a guess without learning: the mean target everywhere", guess=True),
    }
    pictures: ClassVar = {
        "seen": "what the student is given (chequered: hidden)",
        "predicted": "what it says of the hidden patches, in the colours of the row below",
        "truth": "the teacher's targets: their first three principal components as red, green and blue",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top < 1:
            raise ValueError(f"objective.top must be at least 1, got {self.top}")
        if not 1e-4 <= self.beta <= 1e4:  # beyond, gradients vanish in float32
            raise ValueError(f"objective.beta must be in [0.0001, 10000], got {self.beta:g}")
        if not all(0 <= value <= 1 for value in self.momentum):
            raise ValueError(f"objective.momentum must be two numbers in [0, 1], got {self.momentum}")
        if not 0 < self.rise <= 1:
            raise ValueError(f"objective.rise must be in (0, 1], got {self.rise}")

    def momentum_at(self, progress: float) -> float:
        """The teacher's momentum in the update at whose end that share of the run is done."""
        first, last = self.momentum
        return first + (last - first) * min(1.0, progress / self.rise)
