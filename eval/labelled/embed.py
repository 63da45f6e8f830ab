"""Vectors of images for use elsewhere: `mpp embed`."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpp.errors import UserError
from mpp.files import write_atomically
from mpp.shards.classes import of_folder, translation
from mpp.weights import load_encoder

from .images import open_images, outputs


class EmbedError(UserError):
    """A file that vectors can't be written to."""


def embed(
    weights: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    split: str | None = None,
    image: tuple[int, int] | None = None,
    report: Callable[[str], None] = print,
) -> None:
    """Writes the encoder's vector of each image of shards or of a plain folder to an .npz file, whole or not at all.

    image: (h, w) of the images that the encoder is fed; what its weights say where not given.

    Its arrays: `features` float32 (n, d), `keys` (n,), and where images have labels `labels` int64 (n,), -1 for none,
    with `classes`, their names: of all splits of a folder of shards, so that files of two splits number them alike.
    Damaged images are named and left out.
    """
    out = Path(out)
    if out.suffix != ".npz":
        raise EmbedError(f"{out}: expected a name that ends in .npz")
    if not out.absolute().parent.is_dir():
        raise EmbedError(f"{out}: its folder does not exist")
    encoder = load_encoder(weights, image=image)
    features, keys, labels = [], [], []
    with open_images(data, encoder, split) as images:
        for vectors, numbers, names in outputs(encoder, images, "features"):
            features.append(vectors)
            keys += names
            if numbers is not None:
                labels.append(numbers)
        classes = images.classes
    arrays: dict[str, Any] = {"features": torch.cat(features).numpy(), "keys": np.array(keys)}
    if labels:
        everything = of_folder(Path(data)) or classes  # a plain folder's splits are read together
        numbers = translation(classes, everything)[torch.cat(labels).numpy()]
        arrays |= {"labels": numbers, "classes": np.array(everything)}
    np.savez(packed := io.BytesIO(), **arrays)
    write_atomically(out, packed.getvalue())
    report(f"{out}: {len(keys)} vectors of {arrays['features'].shape[1]} numbers")
