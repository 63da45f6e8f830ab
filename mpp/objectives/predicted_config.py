"""What patches can be predicted as, by the name that recipes give it. No torch."""

from collections.abc import Mapping, Sequence
from typing import Literal

from mpp.objectives.config import Metric

TargetName = Literal["mean_colour", "colour_grid", "pixels", "normalised_pixels"]

COLOUR_BITS = 3  # a channel (ViT paper, appendix B.1.2): 512 classes
# Of grey images: the classes of CIFAR-10's patches of 4 pixels then tell 5.8 bits, those of their colours 6.1; of 8
# pixels 5.6 and 5.9 (entropy, 10,000 images). 3 bits would tell 2.8.
GREY_BITS = 6
MOST_BITS = {1: 8, 3: 5}  # a channel, of images with that many: 256 shades, 32,768 colours

COLOURS = {
    "accuracy": Metric("Accuracy", share=True),
    "nearest": Metric("Guess without learning: the nearest visible patch", share=True, guess=True),
    "commonest": Metric("Guess without learning: the commonest answer", share=True, guess=True),
}
DECIBELS = {
    "psnr": Metric("Peak signal to noise of the predicted pixels, dB", decibels=True),
    "flat": Metric("Without learning, dB: each patch in its own true mean", guess=True, decibels=True),
}
COPIED = {"copied": Metric("Guess without learning, dB: the nearest visible patch's pixels", guess=True, decibels=True)}
METRICS: dict[TargetName, Mapping[str, Metric]] = {
    "mean_colour": COLOURS,
    "colour_grid": COLOURS,
    "pixels": COLOURS | DECIBELS | COPIED,
    "normalised_pixels": DECIBELS,
}
FILLED_IN = "each patch gets its true mean and contrast, which are not predicted"  # said of pictures


def check_bits(bits: int | None) -> None:
    """Raises ValueError for bits a channel that no target has."""
    if bits is not None and not 1 <= bits <= max(MOST_BITS.values()):
        raise ValueError(f"objective.bits must be 1 to 5 (2 to 32,768 colours), for grey images 1 to 8, got {bits}")


def bits_of(bits: int | None, channels: int) -> int:
    """Bits a channel of images with that many: those of the settings, or the default; ValueError for too many."""
    if bits is None:
        return GREY_BITS if channels == 1 else COLOUR_BITS
    if channels in MOST_BITS and bits > MOST_BITS[channels]:
        raise ValueError(f"objective.bits must be 1 to {MOST_BITS[channels]} at model.channels {channels}, got {bits}")
    return bits


def of_several(names: Sequence[TargetName], name: TargetName, figure: str) -> str:
    """The name of a target's figure or picture among those of several: the first one's go without its name."""
    return figure if name == names[0] else f"{name}_{figure}"
