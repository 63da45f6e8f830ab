"""The settings of masked patch prediction."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from mpp.objectives.config import Metric, ObjectiveConfig


@dataclass(frozen=True)
class MaskedPatchConfig(ObjectiveConfig):
    """The defaults are the paper's."""

    name: str = "mpp"
    target: Literal["mean_colour", "colour_grid", "pixels"] = "mean_colour"
    share: float = 0.5  # of the patches that are corrupted; the paper found 0.15 slightly worse
    split: tuple[float, float, float] = (0.8, 0.1, 0.1)  # of those: [mask], another patch's embedding, kept
    bits: int = 3  # a colour channel
    grid: int = 4  # cells a side, of colour_grid

    adjustable = ("share", "split")
    metrics: ClassVar = {
        "accuracy": Metric("Accuracy", share=True),
        "nearest": Metric("Guess without learning: the nearest visible patch", share=True, guess=True),
        "commonest": Metric("Guess without learning: the commonest answer", share=True, guess=True),
    }
    pictures: ClassVar = {
        "input": "the image",
        "corrupted": "what the model is given (grey: masked)",
        "predicted": "what it paints into the corrupted patches",
        "truth": "what would have been right",
    }

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"objective.share must be in (0, 1], got {self.share}")
        if min(self.split) < 0 or abs(sum(self.split) - 1) > 1e-6:
            raise ValueError(f"objective.split must be three shares that add up to 1, got {self.split}")
        if not 1 <= self.bits <= 5:
            raise ValueError(f"objective.bits must be 1 to 5 (2 to 32,768 colours), got {self.bits}")
        if self.grid < 1:
            raise ValueError(f"objective.grid must be at least 1, got {self.grid}")
