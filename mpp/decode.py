"""Encoded image bytes to upright uint8 arrays, and one kind of error for whatever cannot be decoded.

JPEG goes through simplejpeg (libjpeg-turbo with the slow, exact DCT: bit-equal to Pillow and 4 times as fast on
32x32 images), everything else through Pillow.
"""

import io
import logging
import re
import struct
import warnings
import zlib

import numpy as np
import simplejpeg
from PIL import Image

from mpp.errors import cause

MAX_PIXELS = 2**28  # 16384 x 16384, of any format; more is refused before memory is taken
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # no format that calls other programs (EPS)
KINDS = {b"\xff\xd8": "JPEG", b"\x89P": "PNG", b"RI": "WebP", b"GI": "GIF", b"BM": "BMP"}  # by the first bytes
EXIF_ORIENTATION = 0x0112  # EXIF 2.3, section 4.6.4
PLAIN = {"YCbCr", "Gray", "RGB"}  # JPEG colour spaces that libjpeg-turbo converts as Pillow does; CMYK is not one
DAMAGE = ("premature end", "bad huffman code", "resync")  # libjpeg warnings that mean wrong pixels; others are harmless
SEQUENTIAL = (0xC0, 0xC1)  # JPEG's frame markers (ITU T.81, table B.1) of pictures that are stored from top to bottom
BEFORE_FRAME = (0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE)  # markers of tables, applications and comments
CONTEXT = 4  # rows below a row that its colours may depend on where they are stored at half the size, and to spare
SPARED = 32  # rows that must be saved for leaving them out to be worth its cost
TOO_LARGE = "its pixels do not fit into memory"

# Pillow refuses twice its own limit, which by default is 179 million pixels; whoever has set it higher keeps that.
if Image.MAX_IMAGE_PIXELS is not None:
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, MAX_PIXELS // 2)

# What Pillow raises on hostile bytes, as found in its plugins; a damaged file must never end a run.
PILLOW_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError,
    RuntimeError, EOFError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
logging.getLogger("PIL").setLevel(logging.CRITICAL)  # it also logs errors, beside raising them
# Pillow warns about oddities (large images, broken EXIF) that we either accept or refuse. `warnings.catch_warnings` is
# not safe in threads, so its warnings are switched off where decoding uses it.
QUIET_PILLOW = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


class DamagedImage(ValueError):
    """Bytes that are no whole image; the message is the cause in one line."""


def decode(data: bytes, mode: str = "RGB") -> np.ndarray:
    """The upright picture (h, w, 3), or (h, w, 1) with mode "L"; alpha is laid on white, 16 bits lose the lower 8.

    For a plain JPEG with mode "L" the result is its luma as stored, without the detour over RGB.
    """
    return decode_first(data, mode)[0]


def decode_first(data: bytes, mode: str) -> tuple[np.ndarray, bool]:
    """As `decode`, and whether this is a flawless JPEG, stored upright: one that `decode_again` may have."""
    try:
        return _decoded(data, mode)
    except MemoryError:
        raise DamagedImage(TOO_LARGE) from None


def decode_again(data: bytes | bytearray, mode: str, height: int, end: int, space: np.ndarray) -> np.ndarray:
    """Decodes a JPEG that `decode_first` approved into `space`, down to row `end`; rows below may be missing.

    The pixels are those of `decode`, in less time: no second look at the header, and nothing below a photograph's crop.
    """
    place = _height_place(data) if end + CONTEXT + SPARED <= height else None
    if place is not None:
        # A JPEG that claims fewer rows is decoded no further. The rest of it is then too much, which strict would mind.
        data = bytearray(data)
        data[place : place + 2] = (end + CONTEXT).to_bytes(2, "big")
    colours = "RGB" if mode == "RGB" else "GRAY"
    try:
        return simplejpeg.decode_jpeg(data, colours, buffer=space, strict=place is None)
    except ValueError as error:
        raise DamagedImage(f"damaged JPEG: {error}") from None


def room(size: int) -> np.ndarray:
    """Memory to decode images of up to so many bytes into.

    It starts at an odd place: where rows start at multiples of 32 bytes libjpeg-turbo writes past the caches, which
    costs a small image a fifth of its decoding.
    """
    return np.empty(size + 1, np.uint8)[1:]


def _decoded(data: bytes, mode: str) -> tuple[np.ndarray, bool]:
    if data[:2] == b"\xff\xd8" and _is_plain_jpeg(data):
        try:
            image = simplejpeg.decode_jpeg(data, "RGB" if mode == "RGB" else "GRAY", strict=True)
        except ValueError as error:
            _refuse_damage(error)
        else:
            orientation = jpeg_orientation(data) if b"Exif\0\0" in data else 1
            return _upright(image, orientation), orientation == 1
    return _decode_with_pillow(data, mode), False


def _height_place(data: bytes | bytearray) -> int | None:
    """Where a sequential JPEG gives its height, in two bytes; None if it is of another kind."""
    place = 2  # behind the start marker
    while place + 9 < len(data):  # each segment is FF, marker, length in two bytes, content
        marker = data[place + 1]
        if marker in SEQUENTIAL:
            return place + 5
        if data[place] != 0xFF or marker not in BEFORE_FRAME:
            return None
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None


def image_size(data: bytes) -> tuple[int, int]:
    """(h, w) of the upright picture, from the header only: what follows it may still be damaged."""
    if data[:2] == b"\xff\xd8":
        try:
            h, w = simplejpeg.decode_jpeg_header(data)[:2]
        except ValueError:
            pass  # Pillow may know it, or says what is wrong
        else:
            _check_pixels(h, w)
            return (w, h) if b"Exif\0\0" in data and jpeg_orientation(data) >= 5 else (h, w)
    with _open(data) as image:
        return image.size if _orientation(image) >= 5 else image.size[::-1]


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether simplejpeg reads it as Pillow would; refuses sizes beyond memory."""
    try:
        h, w, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return False
    _check_pixels(h, w)
    return colours in PLAIN


def _check_pixels(h: int, w: int) -> None:
    if h * w > MAX_PIXELS:
        raise DamagedImage(f"{w}x{h} pixels, more than the limit of {MAX_PIXELS}")


def _refuse_damage(error: ValueError) -> None:
    """Raises for libjpeg's warnings about wrong pixels, which Pillow would pass over in silence."""
    message = str(error)
    if any(words in message.lower() for words in DAMAGE):
        kind = "truncated" if "premature" in message.lower() else "damaged"
        raise DamagedImage(f"{kind} JPEG: {message}") from None


def _open(data: bytes) -> Image.Image:
    """Pillow's lazy image, its size checked, or DamagedImage."""
    if QUIET_PILLOW not in warnings.filters:
        warnings.filters.insert(0, QUIET_PILLOW)  # type: ignore[attr-defined]
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        if data[:3] == b"\xff\xd8\xff":
            raise DamagedImage("damaged JPEG: its header cannot be read") from None
        raise DamagedImage(f"not an image (starts with {bytes(data[:6])!r})" if data else "empty file") from None
    except Image.DecompressionBombError:
        raise DamagedImage(f"more pixels than the limit of {MAX_PIXELS}") from None
    except PILLOW_ERRORS as error:
        raise DamagedImage(_cause(error, data)) from None
    _check_pixels(image.height, image.width)
    return image


def _decode_with_pillow(data: bytes, mode: str) -> np.ndarray:
    with _open(data) as image:
        try:
            return pixels_of(image, mode)
        except PILLOW_ERRORS as error:
            raise DamagedImage(_cause(error, data)) from None


def pixels_of(image: Image.Image, mode: str) -> np.ndarray:
    """The pixels of Pillow's image as `decode` gives those of a file; Pillow's errors if it can't be read."""
    orientation = _orientation(image)
    pixels = np.array(_eight_bits(image, mode))  # a copy: torch takes no read-only array
    return _upright(pixels.reshape(*pixels.shape[:2], -1), orientation)


def _eight_bits(image: Image.Image, mode: str) -> Image.Image:
    """Any of Pillow's modes as RGB or L."""
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is not known")
    if image.mode.startswith("I"):  # I;16, I;16B: 16-bit grey; I: 32 bits, of which files use 16
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("32-bit pixels, whose range is not known")
        image = Image.fromarray((values >> 8).astype(np.uint8))  # the upper byte, as Pillow does for 16-bit RGB
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; broken EXIF counts as upright, since the pixels may be good."""
    if image.format == "TIFF":
        return 1  # Pillow turns these itself while loading, and gives the turned size before
    try:
        value = image.getexif().get(EXIF_ORIENTATION, 1)
    except PILLOW_ERRORS:
        return 1
    return value if value in range(1, 9) else 1


def jpeg_orientation(data: bytes) -> int:
    with _open(data) as image:
        return _orientation(image)


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Turns and mirrors (h, w, c) as EXIF says: 5 to 8 swap the axes, the rest are flips."""
    if orientation >= 5:
        image = image.transpose(1, 0, 2)  # (w, h, c)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)


def _cause(error: BaseException, data: bytes) -> str:
    """One line from Pillow's error, with the format where the first bytes tell it."""
    if isinstance(error, MemoryError):
        return TOO_LARGE
    message = cause(error)
    kind = KINDS.get(bytes(data[:2]), "image")
    truncated = "truncated" in message.lower() or isinstance(error, EOFError)
    return f"{'truncated' if truncated else 'damaged'} {kind}: {message}"
