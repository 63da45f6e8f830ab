"""What becomes of one image of a source: decoded to prove that it is good, and encoded only where it has to be."""

import io
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from mpp.decode import DamagedImage, decode
from mpp.errors import cause
from mpp.shards.sources import READ_ERRORS, Files, Picture
from mpp.shards.tar import ShardError
from mpp.workers import workers

STORED = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp"}  # by their first bytes: endings may lie
CHUNK = 16  # images of one task: few enough for photographs, many enough for 32x32


@dataclass(frozen=True)
class Options:
    """What decides the bytes of the shards."""

    labels: Literal["auto", "none"]
    size: int | None  # pixels, of the shorter side; smaller images stay
    format: Literal["jpg", "png", "webp"] | None  # None: as it is, or png where that is no jpg, png or webp
    quality: int  # 1 to 100, of jpg and webp
    mode: Literal["RGB", "L"]
    per_shard: int  # images
    shard_mib: int

    def __post_init__(self) -> None:
        choices = {"labels": ("auto", "none"), "format": (None, "jpg", "png", "webp"), "mode": ("RGB", "L")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ShardError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if not 1 <= self.quality <= 100:
            raise ShardError(f"quality must be in 1..100, got {self.quality}")
        for name in ("size", "per_shard", "shard_mib"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ShardError(f"{name} must be at least 1, got {value}")

    def __str__(self) -> str:
        kind = f"as {self.format}" if self.format else "in their own format (png where that is not jpg, png or webp)"
        limit = f", shorter side at most {self.size} pixels" if self.size else ""
        return f"{self.mode} images {kind}{limit}, about {self.per_shard} images or {self.shard_mib} MiB a shard"


class Prepared(NamedTuple):
    """An image as it goes into the shard, or the cause why it does not."""

    picture: Picture
    cause: str
    ending: str = ""
    data: bytes = b""
    height: int = 0
    width: int = 0


def prepared(pictures: Sequence[Picture], files: Files, options: Options, threads: int) -> Iterator[Prepared]:
    """The pictures in their order, read, decoded and where needed encoded by threads a few chunks ahead."""

    def prepare(start: int) -> list[Prepared]:
        return [_prepare(picture, files, options) for picture in pictures[start : start + CHUNK]]

    waiting: deque[Future[list[Prepared]]] = deque()
    with workers(threads) as pool:
        for start in range(0, len(pictures), CHUNK):
            waiting.append(pool.submit(prepare, start))
            if len(waiting) > 2 * threads:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def _prepare(picture: Picture, files: Files, options: Options) -> Prepared:
    """Decodes every image, if only to prove that it is good; its bytes are kept where nothing has to change."""
    try:
        data = files.read(picture.number)
        image = decode(data, options.mode)  # (h, w, c)
        kind = STORED.get(data[:2])
        ending = options.format or kind or "png"
        shorter = min(image.shape[:2])
        if options.size and shorter > options.size:
            h, w = (max(1, round(side * options.size / shorter)) for side in image.shape[:2])
            image = np.asarray(_pillow(image).resize((w, h), Image.Resampling.BICUBIC)).reshape(h, w, -1)
        elif kind == ending and options.mode == "RGB":
            return Prepared(picture, "", ending, data, *image.shape[:2])
        return Prepared(picture, "", ending, _encode(image, ending, options.quality), *image.shape[:2])
    except DamagedImage as error:
        return Prepared(picture, str(error))
    except READ_ERRORS as error:
        return Prepared(picture, f"cannot be read: {cause(error)}")


def _pillow(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def _encode(image: np.ndarray, ending: str, quality: int) -> bytes:
    """jpg keeps colours at full resolution, because they are what is predicted."""
    try:
        if ending == "jpg":
            colours = ("GRAY", "Gray") if image.shape[2] == 1 else ("RGB", "444")
            return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, *colours)
        _pillow(image).save(encoded := io.BytesIO(), {"png": "PNG", "webp": "WEBP"}[ending], quality=quality)
        return encoded.getvalue()
    except (ValueError, OSError) as error:
        raise DamagedImage(f"cannot be stored as {ending}: {cause(error)}") from None
