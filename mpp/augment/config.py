"""How training images become pictures: what a recipe says of it, `data.augment` and that of each of `data.views`."""

import math
from dataclasses import dataclass
from typing import Literal

from mpp.augment.input import Input

HIGHEST = 10.0  # magnitude of RandAugment, timm's _LEVEL_DENOM


@dataclass(frozen=True)
class AugmentConfig:
    """How training images become pictures of the encoder's size.

    crop: "inception", a box of random area and aspect (GoogLeNet, arXiv 1409.4842), which the ViT paper pretrains with;
    "shift", a shift by up to `pad` pixels over reflected borders, usual for small images; "none", the centre.
    """

    crop: Literal["inception", "shift", "none"] = "inception"
    area: tuple[float, float] = (0.05, 1.0)  # share of the picture; big_vision's inception_crop
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    pad: int = 4  # pixels
    flip: bool = True  # left to right, every other time
    # How far brightness, contrast, saturation and hue may move, in random order. (0.4, 0.4, 0.2, 0.1) with a chance of
    # 0.8 is usual: BYOL (arXiv 2006.07733, appendix B) and MoCo v3 (arXiv 2104.02057) after SimCLR (arXiv 2002.05709).
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    jitter_chance: float = 0.8
    grey: float = 0.0  # chance to lose all colour; 0.2 is usual (SimCLR, BYOL, MoCo v3)
    blur: float = 0.0  # chance of a Gaussian blur; SimCLR takes 0.5, BYOL 1.0 for one view and 0.1 for the other
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels; SimCLR's for pictures of 224
    solarize: float = 0.0  # chance to invert the upper half of the values; BYOL takes 0.2 for one view
    centre: float = 1.0  # of the shorter side that evaluation sees; 224 / 256 = 0.875 is usual for photographs
    randaugment: int = 0  # operations an image, each left out every other time; 2 is usual
    magnitude: float = 9.0  # of RandAugment's operations, on timm's scale of 0 to 10
    magnitude_std: float = 0.0  # of normal noise on each magnitude; 0.5 is usual (timm's mstd0.5)
    erase: float = 0.0  # chance of an image to lose a rectangle to noise; 0.25 is usual (arXiv 1708.04896)

    def input(self, image: tuple[int, int]) -> Input:
        """What an encoder of such images (h, w) is fed in evaluation, and so goes with its weights."""
        return Input(image, centre=self.centre)

    def __post_init__(self) -> None:
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise ValueError(f"data.augment.area must be two rising shares in (0, 1], got {self.area}")
        if not 0 < self.aspect[0] <= self.aspect[1]:
            raise ValueError(f"data.augment.aspect must be two rising ratios above 0, got {self.aspect}")
        if not 0 < self.centre <= 1:
            raise ValueError(f"data.augment.centre must be in (0, 1], got {self.centre}")
        if self.pad < 0:
            raise ValueError(f"data.augment.pad must not be negative, got {self.pad}")
        if self.randaugment < 0:
            raise ValueError(f"data.augment.randaugment must not be negative, got {self.randaugment}")
        if not 0 <= self.magnitude <= HIGHEST:
            raise ValueError(f"data.augment.magnitude must be in [0, {HIGHEST:g}], got {self.magnitude}")
        if not 0 <= self.magnitude_std < math.inf:
            raise ValueError(f"data.augment.magnitude_std must be finite and not negative, got {self.magnitude_std}")
        self._check_colours()
        for key in ("jitter_chance", "grey", "blur", "solarize", "erase"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"data.augment.{key} must be in [0, 1], got {getattr(self, key)}")

    def _check_colours(self) -> None:
        if len(self.jitter) != 4 or not all(0 <= strength < math.inf for strength in self.jitter):
            kinds = "brightness, contrast, saturation and hue"
            raise ValueError(f"data.augment.jitter must be four strengths of at least 0 ({kinds}), got {self.jitter}")
        if self.jitter[3] > 0.5:
            raise ValueError(f"data.augment.jitter's hue must be at most 0.5, half the circle, got {self.jitter[3]}")
        if len(self.blur_sigma) != 2 or not 0 < self.blur_sigma[0] <= self.blur_sigma[1] < math.inf:
            raise ValueError(f"data.augment.blur_sigma must be two rising pixels above 0, got {self.blur_sigma}")
