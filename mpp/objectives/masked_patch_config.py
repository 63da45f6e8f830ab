"""The settings of masked patch prediction."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from mpp.models.decoder_config import DecoderConfig
from mpp.objectives.config import Metric, Needs
from mpp.objectives.hiding_config import HidingConfig
from mpp.objectives.predicted_config import FILLED_IN, METRICS, TargetName, check_bits, of_several


@dataclass(frozen=True)
class MaskedPatchConfig(HidingConfig):
    """The defaults are the paper's."""

    name: str = "mpp"
    share: float = 0.5  # of the patches that are corrupted; the paper found 0.15 slightly worse
    split: tuple[float, float, float] = (0.8, 0.1, 0.1)  # of those: [mask], another patch's embedding, kept
    target: TargetName | tuple[TargetName, ...] = "mean_colour"  # of several the loss is the sum
    bits: int | None = None  # a colour channel: 3, where images are grey 6
    grid: int = 4  # cells a side, of colour_grid
    decoder: DecoderConfig | None = None  # with one, masked patches are dropped: the encoder does not see them

    adjustable = ("mask", "share", "split", "decoder.dropout", "decoder.drop_path")
    everything: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.split) < 0 or not abs(sum(self.split) - 1) <= 1e-6:
            raise ValueError(f"objective.split must be three shares that add up to 1, got {self.split}")
        if not self.targets or len({*self.targets}) < len(self.targets):
            raise ValueError(f"objective.target must be one name or several different ones, got {[*self.targets]}")
        check_bits(self.bits)
        if self.grid < 1:
            raise ValueError(f"objective.grid must be at least 1, got {self.grid}")

    @property
    def needs(self) -> Needs:
        return Needs(drops_patches=self.decoder is not None)

    def dropped_and_replaced(self, corrupted: int, patches: int) -> tuple[int, int]:
        """How many of an image's corrupted patches are dropped and replaced, where they are dropped: shares, rounded;
        ValueError where nothing is dropped, or nothing left to be seen."""
        dropped = round(self.split[0] * corrupted)
        replaced = round((self.split[0] + self.split[1]) * corrupted) - dropped
        if not 0 < dropped < patches:
            what = "nothing" if dropped else "nothing dropped, which is all that objective.decoder is for"
            raise ValueError(
                f"objective.share {self.share:g} of {patches} patches and objective.split {[*self.split]} leave {what}"
                + " visible" * (dropped > 0)
            )
        return dropped, replaced

    @property
    def targets(self) -> tuple[TargetName, ...]:
        return self.target if isinstance(self.target, tuple) else (self.target,)

    @property
    def metrics(self) -> Mapping[str, Metric]:  # type: ignore[override]  # they follow from the targets
        """Those of the first target, then each further one's with its name."""
        found = {}
        for name in self.targets:
            for figure, metric in METRICS[name].items():
                of = "" if name == self.targets[0] else f" ({name})"
                found[of_several(self.targets, name, figure)] = Metric(metric.title + of, metric.share, metric.guess)
            if len(self.targets) > 1:
                found[f"{name}_loss"] = Metric(f"Loss ({name})")
        return found

    @property
    def pictures(self) -> Mapping[str, str]:  # type: ignore[override]  # as metrics
        masked = "masked" if self.decoder is None else "dropped"
        rows = {"input": "the image", "corrupted": f"what the model is given (chequered: {masked})"}
        for name in self.targets:
            of = "" if len(self.targets) == 1 else f" ({name})"
            filled = f"; {FILLED_IN}" if name == "normalised_pixels" else ""
            painted = f"what it paints into the corrupted patches{of}{filled}"
            rows[of_several(self.targets, name, "predicted")] = painted
            rows[of_several(self.targets, name, "truth")] = f"what would have been right{of}"
        return rows
