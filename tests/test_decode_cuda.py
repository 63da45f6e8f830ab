import io

import numpy as np
import pytest
import simplejpeg
import torch
import torchvision
from conftest import pictures
from PIL import Image

from mpp import decode_cuda
from mpp.decode import DamagedImage, decode
from mpp.decode_cuda import decode_on

# torchvision announces that its decoders will move to TorchCodec.
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding")
CPU = torch.device("cpu")  # on which torchvision decodes lists as well: a stand-in for nvJPEG with the same interface


def encoded(kind: str = "JPEG", size: tuple[int, int] = (40, 56), mode: str = "RGB", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pictures(1, size)[0]).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(exif=exif)


def damaged_within(data: bytes) -> bytes:
    """A JPEG whose header and end are good."""
    place = data.index(b"\xff\xda") + 40
    return data[:place] + bytes(len(data) - place - 2) + data[-2:]


PLAIN = {"jpeg": encoded(), "grey": encoded(mode="L"), "progressive": encoded(progressive=True), "upright": turned(1)}
OTHER = {
    "png": encoded("PNG"),
    "turned": turned(6),
    "mirrored": turned(2),
    "cmyk": encoded(mode="CMYK"),
    "more behind": encoded() + b"more",
}
DAMAGED = {
    "truncated": encoded()[:-300],
    "html": b"<html>no picture</html>",
    "empty": b"",
    "bare": b"\xff\xd8\xff\xd9",
}


class Counting:
    """torchvision's decoder, with the number of JPEGs of each call."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, data, mode, device):
        self.calls.append(len(data))
        return torchvision.io.decode_jpeg(data, mode, device)


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> Counting:
    counting = Counting()
    monkeypatch.setattr(decode_cuda, "decode_jpeg", counting)
    return counting


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pictures_are_those_of_the_cpu_in_their_order(mode, decoder):
    given = [data for pair in zip(OTHER.values(), [*PLAIN.values(), *PLAIN.values()], strict=False) for data in pair]
    found = decode_on(CPU, given, mode)
    for picture, data in zip(found, given, strict=True):
        expected = decode(data, mode)
        assert picture.dtype == torch.uint8
        assert np.array_equal(picture.permute(1, 2, 0).numpy(), expected)
    assert decoder.calls == [len(OTHER)], "plain JPEGs go to the device in one call, nothing else does"


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_image_is_reported_and_the_others_are_decoded(name, decoder):
    first, bad, last = decode_on(CPU, [PLAIN["jpeg"], DAMAGED[name], OTHER["png"]])
    assert isinstance(first, torch.Tensor)
    assert isinstance(last, torch.Tensor)
    assert isinstance(bad, DamagedImage)
    with pytest.raises(DamagedImage, match=str(bad).replace("(", ".").replace(")", ".")):
        decode(DAMAGED[name])
    assert decoder.calls == [1]


def test_a_jpeg_that_the_device_refuses_goes_to_the_cpu_alone(monkeypatch):
    calls, refused = [], OTHER["more behind"][:-4]

    def refusing(data, mode, device):
        calls.append(len(data))
        if any(bytes(one.numpy()) == refused for one in data):
            raise RuntimeError("nvjpegDecode failed")
        return torchvision.io.decode_jpeg(data, mode, device)

    monkeypatch.setattr(decode_cuda, "decode_jpeg", refusing)
    given = [PLAIN["grey"], refused, PLAIN["progressive"]]
    for picture, data in zip(decode_on(CPU, given), given, strict=True):
        assert np.array_equal(picture.permute(1, 2, 0).numpy(), decode(data))
    assert calls == [3, 1, 1, 1]


def test_a_full_device_is_no_damaged_image(monkeypatch):
    def full(data, mode, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(decode_cuda, "decode_jpeg", full)
    with pytest.raises(torch.OutOfMemoryError):
        decode_on(CPU, [PLAIN["jpeg"]])


def test_no_images_give_no_pictures(decoder):
    assert decode_on(CPU, []) == []
    assert decoder.calls == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpus_pictures_differ_in_how_half_size_colours_are_enlarged():
    found = decode_on(torch.device("cuda"), [*PLAIN.values(), *OTHER.values()])
    assert {picture.device.type for picture in found} == {"cuda"}
    found = [picture.permute(1, 2, 0).cpu().numpy() for picture in found]
    for picture, data in zip(found, PLAIN.values(), strict=False):
        plain = simplejpeg.decode_jpeg(data, "RGB", fastupsample=True).astype(int)
        assert np.abs(picture - plain).mean() < 0.1, "another inverse DCT rounds otherwise"
    for picture, data in zip(found[len(PLAIN) :], OTHER.values(), strict=True):
        assert np.array_equal(picture, decode(data)), "the CPU decoded it"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_survives_damage():
    given = [*DAMAGED.values(), damaged_within(encoded()), PLAIN["jpeg"]]
    *bad, _, good = decode_on(torch.device("cuda"), given)
    assert all(isinstance(one, DamagedImage) for one in bad)
    assert good.shape == (3, 40, 56)
