"""The settings of a decoder behind an encoder that sees some of the patches alone. No torch."""

from dataclasses import dataclass
from typing import ClassVar

from mpp.models.trunk_config import MIXER_NAMES, PositionName, TrunkConfig


@dataclass(frozen=True)
class DecoderConfig(TrunkConfig):
    """A trunk's settings; the defaults are those of MAE's decoder (arXiv 2111.06377, table 1)."""

    section: ClassVar[str] = "objective.decoder"
    mixer_names: ClassVar[tuple[str, ...]] = tuple(name for name in MIXER_NAMES if name != "cross")  # has no context

    width: int = 512
    depth: int = 8
    heads: int = 16
    positions: PositionName = "sincos2d_mae"
