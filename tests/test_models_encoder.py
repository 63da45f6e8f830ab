"""What encoders take: uint8 images or normalised ones, of the right shape, and one clear line for anything else."""

import warnings

import numpy as np
import pytest
import torch
from conftest import shaken, tiny_config
from PIL import Image
from tiny_runs import masked
from torch import nn

import mpp
from mpp.batch import Batch
from mpp.loop import train
from mpp.models.classifier import Classifier, Head
from mpp.models.cnn import ResNet
from mpp.models.encoder import PixelWarning
from mpp.models.resnet_config import ResNetConfig
from mpp.models.vit import ViT
from mpp.train_config import LogConfig, TrainConfig
from mpp.weights import load_encoder, save_encoder

REFUSED = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.bool, torch.complex64]
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def vit(**changes) -> ViT:
    return shaken(ViT(tiny_config(**IMAGENET, **changes))).eval()


def cnn(**changes) -> ResNet:
    return ResNet(ResNetConfig(image=(32, 48), depth=18, width=4, stem="small", **IMAGENET, **changes)).eval()


def classifier() -> Classifier:
    return Classifier(vit(), Head(64, 3), "abc").eval()


KINDS = [vit, cnn, classifier, lambda: vit(pool="map"), lambda: vit(stem="conv")]


def images(count: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 32, 48), dtype=torch.uint8)


def line(make, *arguments) -> str:
    with pytest.raises(ValueError) as caught, torch.no_grad():  # noqa: PT011 (the caller looks at the words)
        make(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("dtype", REFUSED)
@pytest.mark.parametrize("make", KINDS)
def test_pixels_of_another_type_are_refused_by_name(make, dtype):
    said = line(make(), images().to(dtype))
    assert f"images are {dtype}, expected uint8 pixels of 0 to 255" in said


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", KINDS)
def test_normalised_images_of_any_precision_give_the_numbers_of_their_values(make, dtype):
    model = make()
    pixels = torch.randn(2, 3, 32, 48).to(dtype)
    with torch.no_grad():
        found, expected = model(pixels), model(pixels.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("make", [vit, cnn])
def test_an_encoder_in_double_precision_computes_in_it(make):
    encoder = make().double()
    pixels = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    assert encoder(pixels).dtype == torch.float64
    assert (encoder(pixels) - make_same(encoder)(pixels.float())).abs().max() > 0


def make_same(encoder):
    """The same in single precision."""
    copy = type(encoder)(encoder.config).eval()
    copy.load_state_dict(encoder.state_dict())
    return copy


@pytest.mark.parametrize("make", KINDS)
def test_floats_that_look_like_pixels_are_named(make):
    model, pixels = make(), images()
    with torch.no_grad():
        for wrong, what in ((pixels.float(), "0 to 255"), (pixels.double() / 255, r"\[0, 1\]")):
            with pytest.warns(PixelWarning, match=f"these look like pixels on {what}.*mpp.PixelWarning"):
                model(wrong)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=mpp.PixelWarning)
            model(pixels.float())


@pytest.mark.parametrize("make", KINDS)
def test_normalised_floats_pass_without_a_word(make):
    model, pixels = make(), images()
    encoder = model.encoder if isinstance(model, Classifier) else model
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        torch.testing.assert_close(model(encoder.normalise(pixels)), model(pixels))
        model(torch.zeros(1, 3, 32, 48))  # a stand-in
        model(torch.full((1, 3, 32, 48), 255.0).div(255))
        model(pixels[:0].float())


def test_an_encoder_of_plain_zero_to_one_takes_it():
    encoder = shaken(ViT(tiny_config(mean=(0.0,), std=(1.0,)))).eval()
    pixels = images()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        torch.testing.assert_close(encoder(pixels / 255), encoder(pixels))
        with pytest.warns(PixelWarning, match="0 to 255"):
            encoder(pixels.float())


def test_training_does_not_look_at_pixels(monkeypatch):
    monkeypatch.setattr(ViT, "look", lambda *given: pytest.fail("that waits for the device"))
    encoder = vit().train()
    encoder(images().float())
    encoder.eval()
    encoder(images())


def test_training_in_python_on_floats_like_pixels_is_named_once(tmp_path):
    class Floats:
        def at(self, step):
            return Batch(torch.rand(8, 3, 16, 16))

        def iterate(self, start, stop=()):
            while True:
                yield self.at(start)

    config = TrainConfig(steps=3, warmup=0, batch=8, micro_batch=4, precision="float32", device="cpu")
    quiet = LogConfig(pictures=0, tensorboard=False)

    class Plain(mpp.Objective):
        def forward(self, batch):
            return self.encoder(batch.images).square().mean(), {}

    with pytest.warns(PixelWarning) as seen:
        train(Plain(masked().encoder), Floats(), config, out=tmp_path, log=quiet)
    assert len(seen) == 1


def test_compiled_and_exported_it_is_the_same():
    encoder, pixels = vit(), images()
    with torch.no_grad():
        expected = encoder(pixels)
        compiled = torch.compile(encoder, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(encoder.normalise(pixels)), expected)
        given = encoder.normalise(pixels)  # of uint8 it is tested with what `mpp convert --to export` writes
        torch.testing.assert_close(torch.export.export(encoder, (given,), strict=False).module()(given), expected)


@pytest.mark.parametrize("make", KINDS)
def test_images_of_another_shape_are_one_line(make):
    model, pixels = make(), images()
    expected = "expected a tensor of images (b, 3, h, w), uint8 or normalised, got"
    last = pixels.permute(0, 2, 3, 1)
    assert f"{expected} shape (3, 32, 48); a single image is images.unsqueeze(0)" in line(model, pixels[0])
    assert f"{expected} shape (32, 48, 3); a single image with its channels last is images.permute(2, 0, 1)" in line(
        model, last[0]
    )
    assert f"{expected} shape (2, 32, 48, 3); with the channels last these are images.permute(0, 3, 1, 2)" in line(
        model, last
    )
    assert f"{expected} shape (32, 48)" in line(model, pixels[0, 0])
    assert f"{expected} shape (1, 2, 3, 32, 48)" in line(model, pixels[None])
    assert "the encoder takes 3 channels, got images with 1" in line(model, pixels[:, :1])
    array = last.numpy()
    assert f"{expected} ndarray of shape (2, 32, 48, 3); encoder.prepare(*pictures)" in line(model, array)
    assert f"{expected} Image; encoder.prepare(*pictures)" in line(model, Image.fromarray(array[0]))
    assert f"{expected} list; encoder.prepare" in line(model, [pixels[0], pixels[1]])
    assert f"{expected} str; encoder.prepare" in line(model, "photo.jpg")


def test_verbs_of_a_vit_say_it_too():
    encoder = vit()
    assert "got shape (3, 32, 48)" in line(encoder.embed, images()[0])
    assert "images are torch.int64" in line(encoder.embed, images().long())
    assert "images are torch.int64" in line(encoder.normalise, images().long())
    assert "must be multiples of the patch (8)" in line(encoder, images()[:, :, :30])


# Pictures


def test_pictures_of_all_kinds_are_prepared_alike(tmp_path):
    picture = Image.fromarray(images(1)[0].permute(1, 2, 0).numpy()).resize((70, 50))
    picture.save(tmp_path / "a.png")
    encoder = vit()
    made = encoder.prepare(tmp_path / "a.png", str(tmp_path / "a.png"), picture, np.asarray(picture))
    assert made.shape == (4, 3, 32, 48)
    assert made.dtype == torch.uint8
    assert all(torch.equal(made[0], other) for other in made[1:])
    assert torch.equal(classifier().prepare(picture), made[:1])
    grey = shaken(ViT(tiny_config(channels=1)))
    assert grey.prepare(picture, np.asarray(picture.convert("L"))).shape == (2, 1, 32, 48)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (torch.zeros(3, 8, 8), "expected a path, PIL's image or a uint8 array (h, w, 3), got Tensor"),
        (np.zeros((8, 8, 3)), "expected arrays uint8 (h, w, 3) of one picture, got float64 (8, 8, 3)"),
        (np.zeros((2, 8, 8, 3), np.uint8), "got uint8 (2, 8, 8, 3)"),
        (np.zeros((8, 8), np.uint8), "got uint8 (8, 8)"),
        ("none.jpg", "none.jpg: No such file or directory"),
        (__file__, "test_models_encoder.py: not an image"),
    ],
)
def test_what_is_no_picture_is_named(wrong, why):
    assert why in line(vit().prepare, wrong)


def test_no_picture_at_all_is_named():
    assert "expected at least one picture" in line(vit().prepare)
    assert "pictures have 1 or 3 channels, the encoder takes 4" in line(ViT(tiny_config(channels=4)).prepare, __file__)


# Loaded encoders


@pytest.mark.parametrize(
    "make", [lambda: ViT(tiny_config(dropout=0.3, drop_path=0.3)), lambda: cnn(norm="batch"), lambda: cnn(norm="group")]
)
def test_a_loaded_encoder_gives_equal_vectors_each_time_and_in_any_company(make, tmp_path):
    encoder = make().train()
    with torch.no_grad():
        for part in encoder.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_(), part.running_var.uniform_(0.5, 2)
    save_encoder(encoder, tmp_path / "encoder.safetensors")
    loaded, pixels = load_encoder(tmp_path / "encoder.safetensors"), images(9)
    before = {name: value.clone() for name, value in loaded.state_dict().items()}
    assert not any(part.training for part in loaded.modules())
    with torch.no_grad():
        once = loaded(pixels)
        torch.testing.assert_close(loaded(pixels), once, rtol=0, atol=0)
        torch.testing.assert_close(torch.cat([loaded(one[None]) for one in pixels]), once, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("make", [vit, lambda: cnn(norm="batch")])
def test_a_resized_encoder_is_the_same_at_any_size(make):
    encoder = make()
    copy = encoder.resized(image=(16, 24))
    assert copy.config.image == copy.input.image == (16, 24)
    assert not copy.training
    small = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(copy(small), encoder(small), rtol=1e-5, atol=1e-5)
