"""What an encoder is fed: how a picture of any size becomes an image of the encoder's size. No torch.

It goes with the weights, in the metadata of their files, as whatever reads pictures for them must do the same: scores
during and after training, `mpp predict`, `probe`, `embed` and `compare`, and the libraries that exports are for. The
rest of it, channels, mean and std, is in the encoder's config, since the encoder normalises by itself.
"""

import math
from dataclasses import dataclass
from typing import Literal

MOST_PIXELS = 2**28  # of the images
Filter = Literal["bilinear", "bicubic"]


@dataclass(frozen=True)
class Input:
    """How evaluation prepares a picture: a centred box of it, resized."""

    image: tuple[int, int]  # (h, w) pixels of what the encoder sees
    centre: float = 1.0  # share of the shorter side that is seen; 224 / 256 = 0.875 is usual for photographs
    # crop: the largest box of the image's aspect; squeeze: the whole picture, whatever its aspect, as transformers' ViT
    fit: Literal["crop", "squeeze"] = "crop"
    filter: Filter = "bilinear"  # antialiased where it shrinks, as PIL's

    def __post_init__(self) -> None:
        sides = self.image
        pair = isinstance(sides, tuple) and len(sides) == 2 and all(type(side) is int and side > 0 for side in sides)
        if not pair or math.prod(sides) > MOST_PIXELS:
            raise ValueError(f"image must be two sides of at least 1 pixel, at most 2 ** 28 in all, got {sides!r:.80}")
        if type(self.centre) not in (int, float) or not 0 < self.centre <= 1:
            raise ValueError(f"centre must be in (0, 1], got {self.centre!r:.80}")
        if self.fit not in ("crop", "squeeze"):
            raise ValueError(f"fit must be one of crop, squeeze, got {self.fit!r:.80}")
        if self.filter not in ("bilinear", "bicubic"):
            raise ValueError(f"filter must be one of bilinear, bicubic, got {self.filter!r:.80}")

    def __str__(self) -> str:
        """In words, for people."""
        share = "" if self.centre == 1 else f"{self.centre:g} of "
        if self.fit == "squeeze":
            box = f"{share}each side of the picture" if share else "the whole picture, squeezed"
        else:
            box = f"the largest centred box of that aspect{f', {self.centre:g} of its sides' if share else ''}"
        return f"{self.image[0]}x{self.image[1]} (height x width), {box}, resized ({self.filter}, antialiased)"
