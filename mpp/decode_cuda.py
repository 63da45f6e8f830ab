"""JPEGs decoded on the GPU, a whole batch in one call: nvJPEG, through torchvision. The CPU decodes what it cannot."""

import warnings

import simplejpeg
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from mpp.decode import MAX_PIXELS, DamagedImage, decode, jpeg_orientation

COLOURS = {"YCbCr", "Gray"}  # JPEG colour spaces that nvJPEG converts as we do
# torchvision 0.29 announces that its decoders will move to TorchCodec, whose own are no part of torch's installation.
warnings.filterwarnings("ignore", "The image decoding and encoding capabilities of TorchVision", DeprecationWarning)
END = b"\xff\xd9"  # of a whole JPEG (ITU T.81, table B.1)


def decode_on(device: torch.device, encoded: list[bytes], mode: str = "RGB") -> list[Tensor | DamagedImage]:
    """The upright pictures (c, h, w) of encoded images, uint8 on the device, or what is wrong with them.

    Whatever is no plain, upright, whole JPEG, or fails, goes through `mpp.decode`, which finds out. nvJPEG keeps
    silent about most damage within a picture; the checksum of the index finds what has changed since it was made.
    """
    plain = [number for number, data in enumerate(encoded) if _is_for_the_device(data)]
    found = dict(zip(plain, _decoded(device, [encoded[number] for number in plain], mode), strict=True))
    pictures: list[Tensor | DamagedImage] = []
    for number, data in enumerate(encoded):
        picture = found.get(number)
        pictures.append(decoded_to(device, data, mode) if picture is None else picture)
    return pictures


def _is_for_the_device(data: bytes) -> bool:
    if data[:2] != b"\xff\xd8" or data[-2:] != END:
        return False
    try:
        h, w, colours, _ = simplejpeg.decode_jpeg_header(data)
        return h * w <= MAX_PIXELS and colours in COLOURS and (b"Exif\0\0" not in data or jpeg_orientation(data) == 1)
    except ValueError:  # DamagedImage is one
        return False


def _decoded(device: torch.device, encoded: list[bytes], mode: str) -> list[Tensor | None]:
    """All JPEGs in one call; if it fails, which one of them does, each alone."""
    if not encoded:
        return []
    data = [torch.frombuffer(bytearray(one), dtype=torch.uint8) for one in encoded]
    try:
        return list(decode_jpeg(data, ImageReadMode.RGB if mode == "RGB" else ImageReadMode.GRAY, device))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # torchvision gives nothing of a batch in which one JPEG fails
        if len(encoded) == 1:
            return [None]
        return [_decoded(device, [one], mode)[0] for one in encoded]


def decoded_to(device: torch.device, data: bytes, mode: str) -> Tensor | DamagedImage:
    """The upright picture (c, h, w), decoded by the CPU and moved to the device, or what is wrong with it."""
    try:
        return torch.from_numpy(decode(data, mode)).permute(2, 0, 1).contiguous().to(device)
    except DamagedImage as error:
        return error
