"""The settings that objectives which hide patches share. No torch: recipes are checked without it."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from mpp.objectives.config import ObjectiveConfig

MaskName = Literal["random", "blocks", "units", "large_units", "inverse_block"]  # those of mpp.masks.MASKS


@dataclass(frozen=True)
class HidingConfig(ObjectiveConfig):
    """Which patches are hidden; mpp.objectives.hiding draws them."""

    mask: MaskName = "random"
    share: float = 0.5  # of the patches that are hidden

    adjustable: ClassVar[tuple[str, ...]] = ("mask", "share")
    everything: ClassVar[bool] = False  # whether all patches may be hidden: something is still to be seen of them
    up: ClassVar[bool] = False  # whether a share is rounded up to whole patches, as that of units always is

    def __post_init__(self) -> None:
        if not (0 < self.share <= 1 if self.everything else 0 < self.share < 1):
            raise ValueError(f"objective.share must be in (0, 1{']' if self.everything else ')'}, got {self.share}")
