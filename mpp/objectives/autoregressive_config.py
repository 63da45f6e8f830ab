"""The settings of autoregressive pretraining."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from mpp.models.patch_head_config import PatchHeadConfig
from mpp.objectives.config import Metric, ObjectiveConfig
from mpp.objectives.predicted_config import FILLED_IN, METRICS, TargetName, check_bits


@dataclass(frozen=True)
class AutoregressiveConfig(ObjectiveConfig):
    """The defaults are a patch's likeness to iGPT's pixels: its mean colour's class, from all before it."""

    name: str = "autoregressive"
    target: TargetName = "mean_colour"
    bits: int | None = None  # a colour channel: 3, as iGPT's palette has for three, where images are grey 6
    grid: int = 4  # cells a side, of colour_grid
    # Of how many first patches each sees all, which are not predicted: none, or 1 to all but one, drawn for each image
    prefix: Literal["none", "random"] = "none"
    head: PatchHeadConfig = field(default_factory=PatchHeadConfig)

    adjustable: ClassVar = ("prefix",)

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.grid < 1:
            raise ValueError(f"objective.grid must be at least 1, got {self.grid}")

    @property
    def metrics(self) -> Mapping[str, Metric]:  # type: ignore[override]  # they follow from the target
        found = dict(METRICS[self.target])
        if "nearest" in found:
            found["nearest"] = replace(found["nearest"], title="Guess without learning: the patch before")
        if "copied" in found:
            found["copied"] = replace(
                found["copied"], title="Guess without learning, dB: the pixels of the patch before"
            )
        return found

    @property
    def pictures(self) -> Mapping[str, str]:  # type: ignore[override]  # as metrics
        filled = f"; {FILLED_IN}" if self.target == "normalised_pixels" else ""
        return {
            "input": "the image",
            "predicted": f"each patch as predicted from the true ones before it (the first is not predicted{filled})",
            "truth": "what would have been right",
        }
