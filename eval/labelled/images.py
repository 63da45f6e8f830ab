"""Images to look at once each, in order and with their names: a split of shards, or a plain folder or archive."""

import logging
import os
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mpp.augment.plan import AugmentConfig, centre, resize
from mpp.batch import Batch
from mpp.data.read import read_shards
from mpp.decode import DamagedImage, decode
from mpp.errors import UserError, cause, shown
from mpp.hardware import autocast, device_of
from mpp.models.encoder import EncoderConfig
from mpp.remote.urls import is_url
from mpp.shards.index import UNFINISHED, no_index, read_index, splits
from mpp.shards.sources import READ_ERRORS, Files, Picture, open_source, understand
from mpp.shards.tar import ShardError

BATCH = 256  # images
MODES = {1: "L", 3: "RGB"}  # by the encoder's channels

logger = logging.getLogger("mpp.eval")


class ImagesError(UserError):
    """A place where no images can be read, or none that fit the encoder."""


class Images(Protocol):
    """What `open_images` gives."""

    place: str  # for messages
    classes: tuple[str, ...]  # names by label; empty without labels
    guessed: bool  # classes are the names of folders, which may stand for anything
    labels: np.ndarray  # (n,) of all images, damaged ones as well; -1 for none

    @property
    def damaged(self) -> dict[str, str]:
        """The causes, by key, for images left out so far."""
        ...

    def batches(self) -> Iterator[tuple[Batch, list[str]]]:
        """Yields the good images and their keys, centred."""
        ...


@contextmanager
def open_images(
    data: str | Path, config: EncoderConfig, split: str | None = None, augment: AugmentConfig | None = None
) -> Iterator[Images]:
    """Opens shards (a folder with an index, or its URL) or a plain folder or archive of images, of any depth.

    split: which one; it may be left out where there is only one.
    augment: says how much of each image evaluation sees (`centre`).

    Raises a UserError of one line if there is nothing to read.
    """
    augment = augment or AugmentConfig()
    if config.channels not in MODES:
        raise ImagesError(f"{data}: images have 1 or 3 channels, the encoder takes {config.channels}")
    if is_url(str(data)):
        yield ShardImages(str(data), config, split or "train", augment)
        return
    data = Path(data)
    if not data.exists():
        raise ImagesError(f"{data}: no such folder")
    if splits(data) or (data / UNFINISHED).is_file():
        split = chosen_split(data, splits(data), split) if splits(data) else split or "train"
        yield ShardImages(data, config, split, augment)
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
        yield FolderImages(data, files, inside, classes, config, augment)


def chosen_split(data: Path, present: list[str], split: str | None) -> str:
    """The named split if it is there, or the only one."""
    if split is None and len(present) > 1:
        raise ImagesError(f"{data}: holds the splits {', '.join(present)}; name one with --split")
    if split is not None and split not in present:
        raise ImagesError(f"{data}: no split {split!r}; it holds {', '.join(present)}")
    return present[0] if split is None else split


class ShardImages:
    """A split of shards; keys are those of the samples."""

    guessed = False

    def __init__(self, data: str | Path, config: EncoderConfig, split: str, augment: AugmentConfig) -> None:
        self.index = read_index(data, split)
        if self.index.mode != MODES[config.channels]:
            kinds = {"L": "grey", "RGB": "colour"}
            found = f"{kinds[self.index.mode]} images, the encoder takes {kinds[MODES[config.channels]]} ones"
            raise ImagesError(f"{data}: holds {found}")
        self.place, self.classes, self.labels = f"{data}: split {split}", self.index.classes, self.index.label
        # Decoded images are not kept: each is looked at once.
        self._batches = read_shards(
            data, BATCH, split=split, image=config.image, train=False, augment=augment, reader="indexed"
        )

    @property
    def damaged(self) -> dict[str, str]:
        marked = dict.fromkeys(np.flatnonzero(self.index.damaged).tolist(), "marked as damaged in the index")
        return {self.index.key(i): why for i, why in sorted((marked | self._batches.damaged).items())}

    def batches(self) -> Iterator[tuple[Batch, list[str]]]:
        for step, batch in enumerate(self._batches.iterate()):
            numbers = range(step * BATCH, min((step + 1) * BATCH, len(self.index)))
            left_out = self._batches.damaged
            keys = [self.index.key(i) for i in numbers if not self.index.damaged[i] and i not in left_out]
            if keys:
                yield batch, keys


class FolderImages:
    """Pictures of a plain folder or archive; keys are their paths in it, classes the folders they lie in."""

    guessed = True

    def __init__(
        self,
        data: Path,
        files: Files,
        pictures: list[Picture],
        classes: list[str],
        config: EncoderConfig,
        augment: AugmentConfig,
    ) -> None:
        numbers = {name: label for label, name in enumerate(classes)}
        self.place, self.classes = str(data), tuple(classes)
        self.damaged: dict[str, str] = {}
        self.labels = np.array([-1 if p.label is None else numbers[p.label] for p in pictures], np.int32)
        self._files, self._pictures, self._config, self._augment = files, pictures, config, augment
        cv2.setNumThreads(1)  # as mpp.data.read: the threads here are enough

    def batches(self) -> Iterator[tuple[Batch, list[str]]]:
        waiting: deque[tuple[int, list[Future[np.ndarray | None]]]] = deque()
        with ThreadPoolExecutor(os.cpu_count(), "decode") as pool:
            for start in range(0, len(self._pictures), BATCH):
                part = self._pictures[start : start + BATCH]
                waiting.append((start, [pool.submit(self._pixels, picture) for picture in part]))
                if len(waiting) == 2:
                    yield from self._batch(*waiting.popleft())
            for last in waiting:
                yield from self._batch(*last)

    def _pixels(self, picture: Picture) -> np.ndarray | None:
        """The centre of a picture in the encoder's size (h, w, c), or None if it is damaged."""
        try:
            pixels = decode(self._files.read(picture.number), MODES[self._config.channels])
        except DamagedImage as error:
            why = str(error)
        except READ_ERRORS as error:
            why = f"cannot be read: {cause(error)}"
        else:
            sizes = np.array([pixels.shape[:2]])
            [[top, left, height, width]] = centre(sizes, self._config.image, self._augment.centre)
            cut = pixels[top : top + height, left : left + width]
            return resize(cut, np.empty((*self._config.image, pixels.shape[2]), np.uint8))
        self.damaged[picture.name] = why
        logger.warning("%s is damaged and left out: %s", shown(picture.name), why)
        return None

    def _batch(self, start: int, work: list[Future[np.ndarray | None]]) -> Iterator[tuple[Batch, list[str]]]:
        """One batch, or none if all its pictures are damaged."""
        found = [(start + i, pixels) for i, future in enumerate(work) if (pixels := future.result()) is not None]
        if found:
            numbers = [number for number, _ in found]
            images = torch.from_numpy(np.stack([pixels for _, pixels in found])).permute(0, 3, 1, 2)  # (b, c, h, w)
            labels = torch.from_numpy(self.labels[numbers].astype(np.int64)) if self.classes else None
            yield Batch(images, labels), [self._pictures[number].name for number in numbers]


@torch.no_grad()
def outputs(
    module: nn.Module, images: Images, what: str, progress: bool = True
) -> Iterator[tuple[Tensor, Tensor | None, list[str]]]:
    """What a module makes of all images, a batch at a time: float32 (b, ...) on the CPU, labels (b,) and keys.

    Computes in bfloat16 where the device multiplies it. Raises ImagesError if every image is damaged.
    """
    device = device_of("auto")
    module.to(device).eval()
    with tqdm(desc=what, total=len(images.labels), unit="image", disable=not progress) as bar:
        for batch, keys in images.batches():
            with autocast(device):
                made = module(batch.images.to(device))
            yield made.float().cpu(), batch.labels, keys
            bar.update(len(keys))
    if len(images.damaged) == len(images.labels):
        raise ImagesError(f"{images.place}: every image is damaged")
    if images.damaged:
        key, why = next(iter(images.damaged.items()))
        logger.warning(
            "%s: damaged images left out: %d, such as %s: %s", images.place, len(images.damaged), shown(key), why
        )
