"""The settings of a head that says something of each patch. No torch."""

from dataclasses import dataclass
from typing import ClassVar

from mpp.models.settings import Settings

MOST = 10**6 // 4  # wide, so that its MLPs are no wider than a trunk's may be


@dataclass(frozen=True)
class PatchHeadConfig(Settings):
    """The default is a linear map. AIM's (arXiv 2401.08541, section 3.2) has depth 12 and width 2048."""

    section: ClassVar[str] = "objective.head"

    depth: int = 0  # MLP blocks before the last linear map
    width: int | None = None  # of these blocks, whose MLPs have four times as many units; the encoder's where not given

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.depth <= 1000:
            raise ValueError(f"{self.section}.depth must be 0 to 1000, got {self.depth}")
        if self.width is not None and not 1 <= self.width <= MOST:
            raise ValueError(f"{self.section}.width must be 1 to {MOST}, got {self.width}")
        if self.width is not None and not self.depth:
            raise ValueError(
                f"{self.section}.width is that of its blocks, and there are none; give {self.section}.depth"
            )
