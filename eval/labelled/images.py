"""The images of a split of shards, or of a plain folder or archive, in order and with their names."""

import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mpp.batch import Batch
from mpp.data.batches import Batches
from mpp.data.folder import open_pictures
from mpp.data.read import read_shards
from mpp.errors import UserError, shown
from mpp.finite import all_finite
from mpp.hardware import autocast, device_of
from mpp.models.encoder import Encoder
from mpp.models.pictures import MODES
from mpp.remote.urls import is_url, shown_url
from mpp.shards.index import UNFINISHED, no_index, read_index, splits
from mpp.shards.sources import open_source, understand
from mpp.shards.tar import ShardError

BATCH = 256  # images

logger = logging.getLogger("mpp.eval")


class ImagesError(UserError):
    """A place where no images can be read, or none that fit the encoder."""


class Images:
    """All images of a place, centred, each with its key: the sample's in shards, the path in a folder."""

    def __init__(self, place: str, batches: Batches, known: Mapping[int, str], guessed: bool) -> None:
        """known: why images are damaged of which that was known before they were read."""
        self.place = place  # for messages
        self.guessed = guessed  # classes are the names of folders, which may stand for anything
        self.index, self._batches, self._known = batches.index, batches, known

    @property
    def classes(self) -> tuple[str, ...]:
        """Names by label; empty without labels."""
        return self.index.classes

    @property
    def labels(self) -> np.ndarray:
        """Of all images (n,), damaged ones as well; -1 for none."""
        return self.index.label

    @property
    def damaged(self) -> dict[str, str]:
        """The causes, by key, for images left out so far."""
        return {self.index.key(i): why for i, why in sorted({**self._known, **self._batches.damaged}.items())}

    def batches(self) -> Iterator[tuple[Batch, list[str]]]:
        """Yields the good images and their keys."""
        for step, batch in enumerate(self._batches.iterate()):
            numbers = range(step * self._batches.batch, min((step + 1) * self._batches.batch, len(self.index)))
            left_out = self._known.keys() | self._batches.damaged
            if keys := [self.index.key(i) for i in numbers if i not in left_out]:
                yield batch, keys


@contextmanager
def open_images(data: str | Path, encoder: Encoder, split: str | None = None) -> Iterator[Images]:
    """Opens shards (a folder with an index, or its URL) or a plain folder or archive of images, of any depth.

    encoder: the images are made as it is fed them (`encoder.input`). split: which one; it may be left out where there
    is only one.

    Raises a UserError of one line if there is nothing to read.
    """
    channels = encoder.config.channels
    if channels not in MODES:
        raise ImagesError(f"{data}: images have 1 or 3 channels, the encoder takes {channels}")
    if is_url(str(data)):
        yield _of_shards(str(data), encoder, split or "train")
        return
    data = Path(data)
    if not data.exists():
        raise ImagesError(f"{data}: no such folder")
    if splits(data) or (data / UNFINISHED).is_file():
        split = chosen_split(data, splits(data), split) if splits(data) else split or "train"
        yield _of_shards(data, encoder, split)
        return
    with tempfile.TemporaryDirectory(prefix="mpp-") as unpacked, open_source(data, Path(unpacked)) as files:
        try:
            pictures, classes = understand(str(data), files, True, logger.info)
        except ShardError:
            if any(data.glob("*.tar")):
                raise no_index(data, split or "train") from None
            raise ImagesError(f"{data}: no images in it") from None
        split = chosen_split(data, sorted({picture.split for picture in pictures}), split)
        inside = [picture for picture in pictures if picture.split == split]
        found = open_pictures(data, files, inside, classes, BATCH, mode=MODES[channels], input=encoder.input)
        yield Images(str(data), *found, guessed=True)


def chosen_split(data: Path, present: list[str], split: str | None) -> str:
    """The named split if it is there, or the only one."""
    if split is None and len(present) > 1:
        raise ImagesError(f"{data}: holds the splits {', '.join(present)}; name one with --split")
    if split is not None and split not in present:
        raise ImagesError(f"{data}: no split {split!r}; it holds {', '.join(present)}")
    return present[0] if split is None else split


def _of_shards(data: str | Path, encoder: Encoder, split: str) -> Images:
    index, mode = read_index(data, split), MODES[encoder.config.channels]
    if index.mode != mode:
        kinds = {"L": "grey", "RGB": "colour"}
        found = f"{kinds[index.mode]} images, the encoder takes {kinds[mode]} ones"
        raise ImagesError(f"{data}: holds {found}")
    # Decoded images are not kept: each is looked at once.
    batches = read_shards(data, BATCH, split=split, input=encoder.input, train=False, reader="indexed")
    marked = dict.fromkeys(np.flatnonzero(index.damaged).tolist(), "marked as damaged in the index")
    return Images(f"{shown_url(str(data))}: split {split}", batches, marked, guessed=False)


@torch.no_grad()
def outputs(
    module: nn.Module, images: Images, what: str, progress: bool = True
) -> Iterator[tuple[Tensor, Tensor | None, list[str]]]:
    """What a module makes of all images, a batch at a time: float32 (b, ...) on the CPU, labels (b,) and keys.

    Computes in bfloat16 where the device multiplies it. Raises ImagesError if every image is damaged, and for one that
    the module has no finite answer to.
    """
    device = device_of("auto")
    module.to(device).eval()
    with tqdm(desc=what, total=len(images.labels), unit="image", disable=not progress) as bar:
        for batch, keys in images.batches():
            with autocast(device):
                made = module(batch.images.to(device)).float().cpu()
            if not all_finite(made):
                key = shown(next(key for key, row in zip(keys, made, strict=True) if not all_finite(row)))
                raise ImagesError(f"{images.place}: the {what} of {key} are not finite; the weights are too large")
            yield made, batch.labels, keys
            bar.update(len(keys))
    if len(images.damaged) == len(images.labels):
        raise ImagesError(f"{images.place}: every image is damaged")
    if images.damaged:
        key, why = next(iter(images.damaged.items()))
        logger.warning(
            "%s: damaged images left out: %d, such as %s: %s", images.place, len(images.damaged), shown(key), why
        )
