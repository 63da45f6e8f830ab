"""What every encoder is told: the images that it takes. No torch: recipes are checked without it."""

from dataclasses import dataclass, replace
from typing import ClassVar

from mpp.models.settings import Settings

MOST_PIXELS = 2**16  # a side
MOST_COLOUR = 10**6  # of a mean or deviation on [0, 1]; what float32 can't hold would fail much later


@dataclass(frozen=True)
class EncoderConfig(Settings):
    """What images an encoder takes, and the name of its kind."""

    adjustable: ClassVar[tuple[str, ...]] = ("dropout", "drop_path")  # settings of training that may change in it

    name: str
    image: tuple[int, int] = (224, 224)  # (h, w) pixels
    channels: int = 3
    mean: tuple[float, ...] = (0.5,)  # of each channel, on [0, 1]; a single number serves all channels
    std: tuple[float, ...] = (0.5,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.image) < 1:
            raise ValueError(f"model.image must be at least 1x1 pixels, got {self.image}")
        if max(self.image) > MOST_PIXELS:
            raise ValueError(f"model.image must be at most {MOST_PIXELS} pixels a side, got {self.image}")
        if not 1 <= self.channels <= 1000:
            raise ValueError(f"model.channels must be 1 to 1000, got {self.channels}")
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, self.channels):
                raise ValueError(f"model.{name} needs 1 or {self.channels} numbers, got {len(getattr(self, name))}")
        if min(self.std) <= 0:
            raise ValueError(f"model.std must be positive, got {self.std}")
        for name in ("mean", "std"):
            if not all(abs(number) <= MOST_COLOUR for number in getattr(self, name)):  # nor one that is no number
                raise ValueError(f"model.{name} must be at most {MOST_COLOUR}, got {getattr(self, name)}")

    def check_image(self, image: tuple[int, int]) -> None:
        """Raises ValueError if the encoder takes no images of that (h, w) beside those of its own size."""
        replace(self, image=image)

    def describe(self) -> str:
        """The encoder in a few words, for tables."""
        return self.name

    @property
    def undroppable(self) -> str | None:
        """Why the encoder can't do without some of the patches, by setting, or None if it can."""
        return f"model.name {self.name} has no patches"
