import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import shaken, tiny_config
from scipy import ndimage
from torch import nn

from mpp.extend import resolve
from mpp.models.cnn import ResNet
from mpp.models.encoder import Encoder
from mpp.models.encoders import ENCODERS, build_encoder
from mpp.models.resnet_config import ResNetConfig
from mpp.models.vit import ViT
from mpp.recipe.files import settings_of

SMALL = {"image": (32, 48), "depth": 18, "width": 4, "stem": "small"}


def small(**changes) -> ResNet:
    """A ResNet whose statistics, like its parameters, are not those at its start."""
    encoder = shaken(ResNet(ResNetConfig(**SMALL | changes)))
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return encoder


def vit(**changes) -> ViT:
    return shaken(ViT(tiny_config(**changes)))


def images(height: int = 32, width: int = 48) -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, height, width), dtype=torch.uint8)


def refusal(encoder: Encoder, given: Encoder) -> str:
    """Why weights are refused, which leaves the encoder as it was."""
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with pytest.raises(ValueError, match=r"^model: ") as caught:
        encoder.adopt(given)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    return str(caught.value)


def follow(encoder, given):
    """Does what the refusal says, as a recipe would: then the weights are taken."""
    advice = refusal(encoder, given).rpartition("to have it as there: ")[2].split()
    settings = {name: tuple(v) if isinstance(v, list) else v for name, v in settings_of(advice)["model"].items()}
    alike = type(encoder)(replace(encoder.config, **settings))
    alike.adopt(given)
    pixels = torch.randint(0, 256, (1, given.config.channels, *given.config.image), dtype=torch.uint8)
    if getattr(alike.config, "pool", None) == getattr(given.config, "pool", None):
        torch.testing.assert_close(alike.eval()(pixels), given.eval()(pixels))


# By name


@pytest.mark.parametrize("config", [tiny_config(), ResNetConfig(**SMALL)])
def test_an_encoder_is_built_by_the_name_of_its_config(config):
    encoder = build_encoder(config)
    kind = ENCODERS[config.name]
    assert (type(encoder), type(encoder.config)) == (resolve(kind.maker), kind.config)
    assert encoder.config == config
    assert encoder(images()).shape == (3, encoder.width)


def test_every_kind_is_listed_under_the_name_of_its_config():
    assert {name: kind.config().name for name, kind in ENCODERS.items()} == {"vit": "vit", "resnet": "resnet"}


def test_settings_are_read_without_torch():
    code = "import sys, mpp.models.encoders, mpp.models.presets; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# Weights of another encoder


@pytest.mark.parametrize("make", [vit, lambda: vit(pool="avg"), small, lambda: small(norm="group")])
def test_with_another_encoders_weights_it_computes_the_same(make):
    given, encoder, pixels = make().eval(), make().eval(), images()
    assert not torch.allclose(encoder(pixels), given(pixels))
    encoder.adopt(given)
    assert torch.equal(encoder(pixels), given(pixels))
    assert encoder.state_dict().keys() == given.state_dict().keys()
    with torch.no_grad():
        next(given.parameters()).add_(1)
    assert not torch.equal(encoder(pixels), given(pixels)), "copies, not the tensors themselves"


def resized(table: np.ndarray, rows: int, columns: int, resize: str) -> np.ndarray:
    """Positions (h, w, d) for another grid: as the ViT paper's code (checkpoint.py) does it, or as MAE's."""
    if resize == "bilinear":
        return ndimage.zoom(table, (rows / table.shape[0], columns / table.shape[1], 1), order=1)
    picture = torch.from_numpy(table).permute(2, 0, 1).unsqueeze(0)
    picture = F.interpolate(picture, size=(rows, columns), mode="bicubic", align_corners=False)
    return picture[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("resize", ["bilinear", "bicubic"])
@pytest.mark.parametrize("image", [(56, 40), (16, 96), (64, 64)])
@pytest.mark.parametrize("pool", ["cls", "avg"])
def test_positions_are_interpolated_for_another_image(resize, image, pool):
    given, encoder = vit(pool=pool, resize=resize), vit(pool=pool, image=image, resize=resize)
    encoder.adopt(given)
    table = given.positions.table.detach()
    rows, columns, prefix = image[0] // 8, image[1] // 8, int(pool == "cls")
    expected = resized(table[prefix:].reshape(4, 6, 64).numpy(), rows, columns, resize)
    found = encoder.positions.table.detach()
    np.testing.assert_allclose(found[prefix:].reshape(rows, columns, 64).numpy(), expected, atol=1e-5)
    assert torch.equal(found[:prefix], table[:prefix])
    own, other = encoder.state_dict(), given.state_dict()
    assert all(torch.equal(own[name], other[name]) for name in own if name != "positions.table")


def test_positions_without_parameters_need_no_interpolation():
    given, encoder = vit(positions="sincos2d"), vit(positions="sincos2d", image=(56, 40))
    encoder.adopt(given)
    pixels = images(56, 40)
    assert torch.equal(encoder(pixels), given(pixels))


def test_a_class_token_is_left_aside_where_patches_are_averaged():
    given, encoder = vit(), vit(pool="avg")
    encoder.adopt(given)
    assert "class_token" not in encoder.state_dict()
    assert torch.equal(encoder.positions.table, given.positions.table[1:])
    own, other = encoder.state_dict(), given.state_dict()
    assert own.keys() < other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own if name != "positions.table")


def test_a_norm_that_moves_behind_the_average_and_a_pool_that_was_not_there_start_anew():
    # As MAE's fine-tuning, which deletes the encoder's norm and adds one behind the average.
    for pool, fresh in {
        "avg_norm": {"norm.weight", "norm.bias"},
        "map": {"pooling.probe", "pooling.query.weight"},
    }.items():
        given, encoder = vit(pool="cls"), ViT(tiny_config(pool=pool, class_token=True))
        before = {name: value.clone() for name, value in encoder.state_dict().items()}
        encoder.adopt(given)
        own, other = encoder.state_dict(), given.state_dict()
        kept = {name for name in own if torch.equal(own[name], before[name])}
        assert fresh <= kept
        assert all(name.startswith(("pooling.",) if pool == "map" else "norm.") for name in kept)
        assert all(torch.equal(own[name], other[name]) for name in own.keys() - kept)
    given, encoder = vit(pool="map"), vit(pool="avg")
    encoder.adopt(given)  # and attention pooling that is not wanted is left aside
    assert torch.equal(encoder.blocks[1].mlp.expand.weight, given.blocks[1].mlp.expand.weight)


@pytest.mark.parametrize("positions", ["learned", "learned2d", "relative", "rope", "sincos2d_mae"])
def test_registers_and_all_kinds_of_positions_are_adopted(positions):
    given = vit(positions=positions, registers=3, resize="bicubic_antialias")
    encoder = vit(positions=positions, registers=3, image=(56, 40))
    encoder.adopt(given)
    pixels = images(56, 40)
    torch.testing.assert_close(encoder(pixels), given(pixels), atol=1e-5, rtol=1e-5)


def test_larger_patches_of_an_enlarged_image_are_the_same_tokens():
    # FlexiViT (arXiv 2212.08013, section 3.4): the pseudo-inverse makes it exact where patches grow.
    given = vit()
    encoder = given.resized(image=(64, 96), patch=16)
    pixels = torch.randn(3, 3, 4, 6, 8, 8)  # a grid of patches, each enlarged by itself
    larger = F.interpolate(pixels.flatten(0, 3).unsqueeze(1), (16, 16), mode="bilinear").reshape(3, 3, 4, 6, 16, 16)
    small, large = (maps.transpose(3, 4).flatten(4, 5).flatten(2, 3) for maps in (pixels, larger))
    torch.testing.assert_close(encoder(large), given(small), atol=2e-4, rtol=2e-4)
    assert encoder.config == tiny_config(image=(64, 96), patch=16)


def test_an_mlp_mixer_keeps_its_grid():
    given = vit(mixer="mlp", pool="avg")
    encoder = vit(mixer="mlp", pool="avg", image=(32, 32))
    assert refusal(encoder, given).startswith("model: image (32, 48) there, (32, 32) here; ")
    follow(encoder, given)
    vit(mixer="mlp", pool="avg", image=(64, 96), patch=16).adopt(given)


def test_a_class_token_can_not_be_made_up():
    assert refusal(vit(), vit(pool="avg")).startswith("model: pool avg there, cls here; ")
    follow(vit(), vit(pool="avg"))
    follow(vit(pool="avg", class_token=True), vit(pool="avg"))
    follow(vit(pool="cls_avg", class_token=True), vit(pool="map"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"stem": "overlap"}, "stem linear there, overlap here"),
        ({"mixer": ("conv", "attention")}, "mixer ('attention', 'attention') there, ('conv', 'attention') here"),
        ({"layer_scale": 0.1}, "layer_scale None there, 0.1 here"),
        ({"width": 32}, "width 64 there, 32 here; mlp 256 there, 128 here"),
        ({"depth": 3}, "depth 2 there, 3 here"),
        ({"pre_norm": True}, "pre_norm False there, True here"),
        ({"stem_bias": False}, "stem_bias True there, False here"),
        ({"gelu": "quick"}, "gelu erf there, quick here"),
        ({"heads": 4}, "heads 2 there, 4 here"),
        ({"mlp": 32}, "mlp 256 there, 32 here"),
        ({"channels": 1}, "channels 3 there, 1 here"),
        ({"mean": (0.4,)}, "mean (0.5,) there, (0.4,) here"),
        ({"std": (0.4,)}, "std (0.5,) there, (0.4,) here"),
        ({"positions": "none"}, "positions learned there, none here"),
        ({"gelu": "tanh"}, "gelu erf there, tanh here"),
        ({"norm_eps": 1e-5}, "norm_eps 1e-06 there, 1e-05 here"),
    ],
)
def test_what_decides_the_weights_must_be_alike(changes, expected):
    assert refusal(vit(**changes), vit()).startswith(f"model: {expected}; to have it as there: model.")
    follow(vit(**changes), vit())
    if "positions" not in changes and "stem" not in changes:
        follow(vit(), vit(**changes))  # and the other way round


def test_many_differences_are_followed_at_once():
    there = vit(mean=(0.485, 0.456, 0.406), layer_scale=1e-5, norm_eps=1e-12, qkv_bias=False, registers=2)
    follow(vit(swiglu=True), there)


def test_what_is_for_training_alone_may_differ():
    given, encoder = vit().eval(), vit(dropout=0.1, drop_path=0.2).eval()
    encoder.adopt(given)
    pixels = images()
    assert torch.equal(encoder(pixels), given(pixels))


def test_a_resnet_takes_another_ones_weights_for_images_of_another_size():
    given, encoder = small().eval(), small(image=(64, 40)).eval()
    encoder.adopt(given)
    pixels = images(64, 40)
    assert torch.equal(encoder(pixels), given(pixels))
    assert torch.equal(encoder.bn1.running_var, given.bn1.running_var)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"width": 8}, "width 4 there, 8 here"),
        ({"depth": 34}, "depth 18 there, 34 here"),
        ({"stem": "imagenet"}, "stem small there, imagenet here"),
        ({"norm": "group"}, "norm batch there, group here"),
    ],
)
def test_a_resnet_of_another_shape_is_refused(changes, expected):
    assert refusal(small(**changes), small()).startswith(f"model: {expected}; ")
    follow(small(**changes), small())


def test_one_kind_does_not_take_anothers_weights():
    assert refusal(vit(), small()) == "model: name resnet there, vit here"
    assert "to have it" not in refusal(small(), vit())
    assert refusal(small(), vit()).startswith("model: name vit there, resnet here; ")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"gelu": "relu"}, "model.gelu must be one of erf, tanh, quick, got 'relu'"),
        ({"resize": "nearest"}, "model.resize must be one of bilinear, .*, got 'nearest'"),
        ({"width": 64.0}, "model.width must be int, got 64.0"),
        ({"mixer": (["pool"],)}, r"model.mixer must be tuple\[str, ...\], got \(\['pool'\],\)"),
        ({"norm_eps": float("nan")}, "model.norm_eps must be float, got nan"),
        ({"image": (10**12, 8)}, "model.image must be at most 65536 pixels a side"),
        ({"stem": "hybrid", "stages": (10**9,)}, "model.stages must be 1 to 1000 each"),
    ],
)
def test_settings_of_another_type_or_size_are_refused_by_name(changes, expected):
    with pytest.raises(ValueError, match=expected):
        tiny_config(**changes)


def test_lists_are_taken_for_tuples_and_numpys_numbers_for_numbers():
    assert tiny_config(image=[32, 48], mixer=["pool", "attention"]) == tiny_config(mixer=("pool", "attention"))
    assert tiny_config(width=np.int64(64)) == tiny_config()
