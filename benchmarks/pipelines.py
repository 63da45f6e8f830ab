"""Reading images as others have it: webdataset with Pillow and torchvision, and Pillow and torchvision alone.

Each function gives an endless iterator over batches, as float32, normalised.
"""

import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import webdataset
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as in torchvision's reference training
SHUFFLE = 1000  # samples in the buffer, as in webdataset's README

Box = tuple[int, int, int, int]  # top, left, height, width


def tars(folder: Path, split: str) -> list[str]:
    paths = sorted(str(path) for path in folder.glob(f"{split}-*.tar"))
    if not paths:
        raise SystemExit(f"{folder}: no {split}-*.tar there; make shards with `mpp shards make SOURCE {folder}`")
    return paths


def webdataset_batches(folder: Path, split: str, side: int, batch: int, workers: int) -> Iterator[Tensor]:
    """webdataset's README pipeline with the usual torchvision transforms, endless."""
    augment = transforms.Compose(
        [
            transforms.RandomResizedCrop(side),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    dataset = (
        webdataset.WebDataset(tars(folder, split), resampled=True, shardshuffle=False)  # endless, shards drawn anew
        .shuffle(SHUFFLE)
        .decode("pil")
        .to_tuple("jpg;png;webp")
        .map_tuple(augment)
        .batched(batch)
    )
    for (images,) in webdataset.WebLoader(dataset, batch_size=None, num_workers=workers):
        yield images  # (b, c, h, w)


def encoded(folder: Path, split: str) -> list[bytes]:
    """All images of a split as they lie in its tars."""
    images = []
    for path in tars(folder, split):
        with tarfile.open(path) as tar:
            files = (tar.extractfile(member) for member in tar if member.name.endswith((".jpg", ".png", ".webp")))
            images += [file.read() for file in files if file is not None]
    return images


def pillow_crop(data: bytes, box: Box, side: int, flip: bool = False, upright: bool = False) -> Tensor:
    """A crop scaled to side x side as torchvision's transforms do it, (c, h, w) in [0, 1].

    upright: turned as EXIF says, for which the boxes are; torchvision's own loader, which is timed, leaves that out.
    """
    image = Image.open(io.BytesIO(data)).convert("RGB")
    if upright:
        ImageOps.exif_transpose(image, in_place=True)
    crop = functional.resized_crop(image, *box, [side, side], antialias=True)
    return functional.to_tensor(functional.hflip(crop) if flip else crop)


def pillow_batches(images: Sequence[bytes], boxes: Sequence[Box], side: int, batch: int) -> Iterator[Tensor]:
    """Batches of crops, endless, the i-th image's always with the i-th box; every second one is flipped."""
    position = 0
    while True:
        places = [place % len(images) for place in range(position, position + batch)]
        crops = [pillow_crop(images[place], boxes[place], side, flip=place % 2 == 1) for place in places]
        yield torch.stack([functional.normalize(crop, MEAN, STD) for crop in crops])  # (b, c, h, w)
        position += batch
