"""mpp/decode.py against Pillow, which decodes, turns and converts by its own code."""

import io
import random
import struct
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from mpp.decode import MAX_PIXELS, DamagedImage, decode, decode_again, decode_first, image_size, room

ODD_MODES = (
    "1 PNG, L PNG, P PNG, P GIF, RGB BMP, RGB PPM, L PPM, 1 PPM, CMYK TIFF, CMYK JPEG, YCbCr JPEG, RGB TIFF, RGB WEBP"
)
RANDOM = np.random.default_rng(0)
SMOOTH = np.asarray(Image.fromarray(RANDOM.integers(0, 256, (5, 7, 3), np.uint8)).resize((43, 29), Image.BICUBIC))


def saved(image: Image.Image, kind: str, **options) -> bytes:
    image.save(data := io.BytesIO(), kind, **options)
    return data.getvalue()


def picture(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(SMOOTH).convert(mode)


def pillow(data: bytes, mode: str = "RGB") -> np.ndarray:
    """The reference for files without alpha or 16 bits."""
    with Image.open(io.BytesIO(data)) as image:
        return np.atleast_3d(np.asarray(ImageOps.exif_transpose(image).convert(mode)))


def jpeg_with_orientation(orientation: int, mode: str = "RGB") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(picture(mode), "JPEG", exif=exif)


def jpeg_that_claims(h: int, w: int) -> bytes:
    """A JPEG whose header gives another size than its pixels have."""
    data = bytearray(saved(picture(), "JPEG"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = h.to_bytes(2, "big") + w.to_bytes(2, "big")
    return bytes(data)


@pytest.mark.parametrize("sampling", ["444", "422", "420", "440", "411", "Gray"])
@pytest.mark.parametrize("quality", [30, 95])
def test_a_jpeg_is_bit_equal_to_pillow(sampling, quality):
    data = simplejpeg.encode_jpeg(SMOOTH, quality, "RGB", sampling)
    assert np.array_equal(decode(data), pillow(data))


def test_a_progressive_jpeg_is_bit_equal_to_pillow():
    data = saved(picture(), "JPEG", progressive=True)
    assert np.array_equal(decode(data), pillow(data))


TALL = np.asarray(Image.fromarray(SMOOTH).resize((37, 90)))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    "data",
    [
        *(simplejpeg.encode_jpeg(TALL, 80, "RGB", kind) for kind in ["444", "422", "420", "440", "411", "Gray"]),
        *(saved(Image.fromarray(TALL), "JPEG", **{option: 1}) for option in ["restart_marker_blocks", "optimize"]),
        saved(Image.fromarray(TALL), "JPEG", exif=b"Exif\0\0" + b"MM\0*" + b"\xff\xc0" * 40),
        saved(Image.fromarray(TALL), "JPEG", progressive=True),  # always as a whole
    ],
)
def test_decoding_again_down_to_a_row_gives_the_same_rows(data, mode):
    whole, approved = decode_first(data, mode)
    assert approved
    for end in range(1, 91):
        rows = decode_again(data, mode, 90, end, room(whole.size))
        assert len(rows) >= end
        assert np.array_equal(rows[:end], whole[:end])


def test_a_crop_from_the_top_spares_the_rows_below():
    data = simplejpeg.encode_jpeg(TALL, 80)
    assert len(decode_again(data, "RGB", 90, 20, room(TALL.size))) < 60


@pytest.mark.parametrize(
    "data",
    [
        jpeg_with_orientation(3),
        jpeg_with_orientation(1, "CMYK"),
        saved(picture(), "PNG"),
        saved(picture(), "JPEG").replace(b"\xff\xc0", b"\0\0\xff\xc0", 1),  # libjpeg warns of two bytes too much
    ],
)
def test_only_flawless_upright_jpegs_are_approved(data):
    image, approved = decode_first(data, "RGB")
    assert not approved
    assert np.array_equal(image, decode(data))


def test_an_image_that_outgrew_its_room_is_damaged():
    with pytest.raises(DamagedImage, match="too small"):
        decode_again(saved(picture(), "JPEG"), "RGB", 29, 29, room(100))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_comes_out_upright(orientation, mode):
    data = jpeg_with_orientation(orientation, mode)
    assert np.array_equal(decode(data), pillow(data))
    assert image_size(data) == pillow(data).shape[:2]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_other_formats_obey_exif_too(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(picture(), kind, exif=exif)
    assert decode(data).shape == (43, 29, 3) == (*image_size(data), 3)
    assert np.array_equal(decode(data), pillow(data))


def test_broken_exif_leaves_a_good_image_as_it_is():
    data = saved(picture(), "JPEG")
    exif = b"Exif\0\0" + b"MM\0*" + b"\xff" * 40
    broken = data[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + data[2:]
    assert np.array_equal(decode(broken), pillow(data))


@pytest.mark.parametrize(
    ("mode", "kind"),
    [tuple(pair.split()) for pair in ODD_MODES.split(", ")],
)
def test_odd_modes_come_out_as_rgb(mode, kind):
    data = saved(picture(mode), kind)
    assert decode(data).shape == (29, 43, 3)
    assert np.array_equal(decode(data), pillow(data))
    assert image_size(data) == (29, 43)


@pytest.mark.parametrize(("mode", "kind"), [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "TIFF")])
def test_alpha_lies_on_white(mode, kind):
    image = picture(mode)
    alpha = RANDOM.integers(0, 256, (29, 43), np.uint8)
    image.putalpha(Image.fromarray(alpha))
    opaque = np.atleast_3d(np.asarray(image)).astype(float)[:, :, :-1]
    expected = 255 + (opaque - 255) * (alpha[:, :, None] / 255)  # (h, w, 1 or 3)
    assert np.abs(decode(saved(image, kind)) - expected).max() <= 1


def test_a_transparent_palette_entry_is_white():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([10, 20, 30, 200, 0, 0])
    assert (decode(saved(image, "PNG", transparency=1)) == 255).all()
    assert (decode(saved(image, "PNG", transparency=bytes([255, 0]))) == 255).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_keep_their_upper_eight(kind):
    values = RANDOM.integers(0, 2**16, (6, 5), np.uint16)
    image = decode(saved(Image.fromarray(values), kind))
    assert np.array_equal(image, np.repeat(values[:, :, None] // 256, 3, 2))


@pytest.mark.parametrize("values", [np.full((2, 2), 0.5, np.float32), np.full((2, 2), 2**20, np.int32)])
def test_pixels_of_unknown_range_are_refused(values):
    with pytest.raises(DamagedImage, match="range is not known"):
        decode(saved(Image.fromarray(values), "TIFF"))


def test_grey_mode_gives_the_luma_as_stored():
    data = saved(picture(), "JPEG")
    with Image.open(io.BytesIO(data)) as image:
        image.draft("L", image.size)
        luma = np.asarray(image)
    assert np.array_equal(decode(data, "L"), luma[:, :, None])
    assert np.array_equal(decode(saved(picture(), "PNG"), "L"), pillow(saved(picture(), "PNG"), "L"))


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "empty file"),
        (b"<html>\n<body>", "not an image (starts with b'<html>')"),
        (saved(picture(), "JPEG")[:-200], "truncated JPEG"),
        (saved(picture(), "JPEG")[:200], "JPEG: "),
        (saved(picture(), "PNG")[:-200], "truncated PNG"),
        (saved(picture(), "WEBP")[:-100], "WebP"),
        (jpeg_that_claims(50_000, 50_000), "50000x50000 pixels, more than the limit of"),
    ],
)
def test_damaged_bytes_give_their_cause_in_one_line(data, cause):
    with pytest.raises(DamagedImage) as caught:
        decode(data)
    assert cause in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_jpeg_with_broken_codes_is_damaged_even_where_pillow_only_warns():
    data = simplejpeg.encode_jpeg(RANDOM.integers(0, 256, (64, 64, 3), np.uint8), 90)
    middle = len(data) // 2
    broken = data[:middle] + bytes([0xFF, 0xD9]) + data[-2:]  # the end mark halfway
    with pytest.raises(DamagedImage, match="truncated JPEG"):
        decode(broken)


def test_a_huge_png_is_refused_without_a_warning():
    data = bytearray(saved(Image.new("L", (9, 9)), "PNG"))
    for side in (12_000, 30_000):  # where Pillow warns, and where it refuses
        data[16:24] = side.to_bytes(4, "big") * 2
        with pytest.raises(DamagedImage):
            decode(bytes(data))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM"])
def test_random_damage_never_raises_anything_else_and_never_warns(kind):
    draw, whole = (
        random.Random(kind),
        bytes(jpeg_with_orientation(3)) if kind == "JPEG" else saved(picture("P").convert("RGB"), kind),
    )
    causes = []
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 8)):
            data[draw.randrange(min(len(data), draw.choice([40, 400, len(data)])))] = draw.randrange(256)
        if draw.random() < 0.3:
            del data[draw.randrange(len(data)) :]
        for function in (decode, image_size):
            try:
                function(bytes(data))
            except DamagedImage as error:
                causes.append(str(error))
    assert causes
    assert not any("\n" in cause for cause in causes)


def test_threads_decode_without_warnings():
    image = Image.fromarray(np.zeros((4, 4), np.uint8)).convert("P")
    data = saved(image, "PNG", transparency=bytes(range(4)))  # Pillow warns about this kind
    with warnings.catch_warnings(record=True) as caught, ThreadPoolExecutor(4) as pool:
        warnings.simplefilter("always")
        list(pool.map(decode, [data] * 50))
    assert not caught


def test_decoding_imports_no_torch():
    code = "import sys, mpp.shards.write, mpp.shards.index; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_pixels_that_do_not_fit_into_memory_are_damage_not_the_end():
    code = """
import io, resource
import simplejpeg
from PIL import Image
from mpp.decode import DamagedImage, decode
Image.new("RGB", (8, 8)).save(data := io.BytesIO(), "JPEG")
size = bytes([0x40, 0]) * 2  # 16384x16384, which its header claims
place = data.getvalue().index(bytes([0xFF, 0xC0])) + 5
huge = data.getvalue()[:place] + size + data.getvalue()[place + 4:]
limit = 2**20 * 700
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    decode(huge)
except DamagedImage as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "its pixels do not fit into memory\n", run.stderr


def huge_png(side: int) -> bytes:
    """A white picture of side x side pixels of one bit."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer, row = zlib.compressobj(9), b"\0" + b"\xff" * ((side + 7) // 8)
    body = b"".join(packer.compress(row * 128) for _ in range(side // 128)) + packer.compress(row * (side % 128))
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", body + packer.flush()) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def test_the_limit_of_pixels_is_that_of_the_docs_for_every_format():
    """Pillow alone refuses 2 * 89,478,485 pixels; 2^28 are promised, of JPEG and of the others alike."""
    assert Image.MAX_IMAGE_PIXELS is None or 2 * Image.MAX_IMAGE_PIXELS >= MAX_PIXELS
    assert image_size(huge_png(16384)) == (16384, 16384)
    for data in (huge_png(16512), huge_bmp(16385, 16384), huge_bmp(2**31 - 1, 2**31 - 1), huge_bmp(2**31 - 1, 1)):
        with pytest.raises(DamagedImage, match="than the limit of 268435456"):
            image_size(data)
        with pytest.raises(DamagedImage, match="than the limit of 268435456"):
            decode(data, "L")


def huge_bmp(width: int, height: int) -> bytes:
    """The header of a bitmap, which claims so many pixels."""
    return struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 62, 0, 0, 62, 40, width, height, 1, 1, 0, 0, 0, 0, 2, 2) + bytes(8)


@pytest.mark.slow
def test_a_picture_of_more_pixels_than_pillow_allows_is_decoded():
    found = decode(huge_png(14_200), "L")
    assert found.shape == (14_200, 14_200, 1)
    assert found.min() == 255
