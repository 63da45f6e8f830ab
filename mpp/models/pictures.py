"""Pictures of any kind and size as an encoder is fed them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mpp.augment import plan
from mpp.augment.input import Input
from mpp.decode import PILLOW_ERRORS, DamagedImage, decode, pixels_of
from mpp.errors import UserError, cause, shown

MODES = {1: "L", 3: "RGB"}  # PIL's, by channels


class PictureError(UserError):
    """Something that is no picture, or that can't be read."""


def prepared(pictures: Sequence[Any], channels: int, input: Input) -> Tensor:
    """Pictures as uint8 (b, c, h, w), what `mpp predict` makes of the same; PictureError names the first that is none.

    pictures: paths of image files, PIL's images, or uint8 arrays (h, w, c) or, of one channel, (h, w).
    """
    if not pictures:
        raise PictureError("expected at least one picture: a path, PIL's image or a uint8 array (h, w, c), got none")
    made = [plan.prepared(_pixels(picture, channels), input) for picture in pictures]
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2)


def _pixels(picture: Any, channels: int) -> np.ndarray:
    """A picture's upright pixels, uint8 (h, w, c)."""
    if isinstance(picture, np.ndarray):
        pixels = picture[..., None] if picture.ndim == 2 else picture
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != channels or not pixels.size:
            raise PictureError(
                f"expected arrays uint8 (h, w, {channels}) of one picture, got {picture.dtype} {picture.shape}"
            )
        return pixels.copy()  # torch takes no array that is read-only
    if not isinstance(picture, str | Path | Image.Image):
        raise PictureError(
            f"expected a path, PIL's image or a uint8 array (h, w, {channels}), got {type(picture).__name__}"
        )
    if channels not in MODES:
        raise PictureError(f"pictures have 1 or 3 channels, the encoder takes {channels}; give it arrays (h, w, c)")
    if isinstance(picture, Image.Image):
        try:
            return pixels_of(picture, MODES[channels])
        except PILLOW_ERRORS as error:
            raise PictureError(f"a picture of PIL's, {picture.mode} {picture.size}: {cause(error)}") from None
    try:
        return decode(Path(picture).read_bytes(), MODES[channels])
    except (OSError, DamagedImage) as error:
        raise PictureError(f"{shown(picture)}: {cause(error)}") from None
