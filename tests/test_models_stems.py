import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.lib.stride_tricks import sliding_window_view

from mpp.models.stems import STEMS, Stem, lecun_normal_
from mpp.models.vit_config import ViTConfig

NAMES = ["linear", "overlap", "conv", "hybrid"]


def made(name: str, patch: int = 8, channels: int = 3, width: int = 32, **more) -> Stem:
    """A stem with random values in every parameter, norms and biases included."""
    sizes = {"image": (3 * patch, 3 * patch), "patch": patch, "channels": channels, "width": width}
    config = ViTConfig(stem=name, **sizes, depth=1, heads=2, **{"stages": (1, 1), **more})
    torch.manual_seed(0)
    stem = STEMS[name](config)
    with torch.no_grad():
        stem.initialise()
        for parameter in stem.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return stem


def pictures(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_the_table_has_every_stem_the_config_names():
    assert sorted(STEMS) == sorted(ViTConfig.__annotations__["stem"].__args__) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_tokens_are_the_patches_of_the_grid_at_any_size_and_number_of_channels(name, channels):
    stem = made(name, channels=channels)
    for height, width in ((16, 16), (24, 40), (8, 56)):
        tokens = stem(pictures(2, channels, height, width))
        assert tokens.shape == (2, height * width // 64, 32)
        assert tokens.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_tokens_stand_row_by_row(name):
    """A change of one patch's pixels changes most its own token, or one next to it where patches overlap."""
    stem = made(name)
    images = pictures(1, 3, 48, 80)
    changed = images.clone()
    changed[:, :, 16:24, 56:64] += 3 * pictures(1, 3, 8, 8)  # row 2, column 7 of 6 x 10
    difference = (stem(changed) - stem(images)).norm(dim=-1)[0]
    row, column = divmod(difference.argmax().item(), 10)
    assert max(abs(row - 2), abs(column - 7)) <= stem.overlaps


@pytest.mark.parametrize("name", NAMES)
def test_a_token_depends_on_pixels_outside_its_patch_just_where_overlaps_says_so(name):
    stem = made(name).double()
    images = pictures(1, 3, 40, 40).double().requires_grad_()
    (stem(images)[0, 12] * torch.linspace(1, 2, 32)).sum().backward()  # row 2, column 2 of 5 x 5
    inside = torch.zeros(40, 40, dtype=torch.bool)
    inside[16:24, 16:24] = True
    assert images.grad[..., inside].abs().min() > 0
    assert bool(images.grad[..., ~inside].abs().max() > 0) is stem.overlaps


@pytest.mark.parametrize("name", NAMES)
def test_an_images_tokens_do_not_depend_on_the_others_of_its_batch(name):
    stem = made(name).double().train()
    images = pictures(3, 3, 24, 16).double()
    torch.testing.assert_close(stem(images)[1:2], stem(images[1:2]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_parameters_take_float32_images(name):
    stem, images = made(name), pictures(2, 3, 24, 16)
    expected = stem(images)
    tokens = stem.bfloat16()(images)
    assert tokens.dtype == torch.bfloat16
    assert (tokens.float() - expected).norm() < 0.03 * expected.norm()
    tokens.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in stem.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_autocast_gives_nearly_the_same_tokens(name):
    stem, images = made(name), pictures(2, 3, 24, 16)
    expected = stem(images)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = stem(images)
    assert (tokens.float() - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("name", NAMES)
def test_stems_can_be_made_on_the_meta_device(name):
    with torch.device("meta"):
        stem = STEMS[name](ViTConfig(stem=name))
        with torch.no_grad():
            stem.initialise()
        assert stem(torch.empty(2, 3, 224, 224)).shape == (2, 196, 768)


@pytest.mark.parametrize("name", NAMES)
def test_initialise_draws_everything_anew(name):
    stem = made(name)
    fresh = made(name)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.fill_(torch.nan)
        for stem_ in (stem, fresh):
            torch.manual_seed(3)
            stem_.initialise()
    for key, value in fresh.state_dict().items():
        assert torch.equal(value, stem.state_dict()[key]), key
        assert not value.any() if key.endswith("bias") else (value.any() or key.endswith("norm3.weight")), key
    weight = stem.project.weight
    assert weight.std().item() == pytest.approx(math.prod(weight.shape[1:]) ** -0.5, rel=0.1)


def test_lecun_normal_has_variance_one_over_fan_in_for_maps_and_convolutions():
    for shape in ((400, 300), (300, 20, 5, 5)):
        weight = torch.empty(shape)
        lecun_normal_(weight)
        std = math.prod(shape[1:]) ** -0.5
        assert weight.std().item() == pytest.approx(std, rel=0.01)
        assert weight.abs().max().item() <= 2 * std / 0.8796 + 1e-6


def test_a_new_hybrid_unit_passes_on_its_shortcut():
    stem = made("hybrid", stages=(2,))
    with torch.no_grad():
        stem.initialise()
    maps = pictures(1, 256, 4, 4).relu()
    torch.testing.assert_close(stem.stages[0][1](maps), maps, rtol=0, atol=0)


# Plain references.


def test_the_linear_stem_maps_pixels_in_row_column_channel_order():
    stem, images = made("linear").double(), pictures(2, 3, 16, 24).double()
    weight = stem.project.weight.reshape(32, 8, 8, 3)
    tokens = stem(images)
    for row in range(2):
        for column in range(3):
            patch = images[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            expected = torch.einsum("dpqc,bcpq->bd", weight, patch) + stem.project.bias
            torch.testing.assert_close(tokens[:, 3 * row + column], expected)


@pytest.mark.parametrize("patch", [1, 4, 7])
def test_an_overlapping_token_is_a_dot_product_with_its_window_of_the_zero_padded_image(patch):
    stem, images = made("overlap", patch=patch).double(), pictures(2, 3, 3 * patch, 5 * patch).double()
    padded = torch.zeros(2, 3, 5 * patch, 7 * patch, dtype=torch.float64)  # a whole patch of zeros on every side
    padded[:, :, patch : 4 * patch, patch : 6 * patch] = images
    tokens = stem(images)
    for row in range(3):
        for column in range(5):
            top, left = patch * row + 1, patch * column + 1  # the window starts patch - 1 pixels before the patch
            window = padded[:, :, top : top + 2 * patch - 1, left : left + 2 * patch - 1]
            expected = torch.einsum("dcpq,bcpq->bd", stem.project.weight, window) + stem.project.bias
            torch.testing.assert_close(tokens[:, 5 * row + column], expected)


@pytest.mark.parametrize("patch", [2, 4, 16])
def test_the_convolutional_stem_is_halving_convolutions_with_norm_and_relu_and_a_map(patch):
    stem, images = made("conv", patch=patch, width=48).double(), pictures(2, 3, 3 * patch, 5 * patch).double()
    weights = {key: value.detach() for key, value in stem.named_parameters()}
    maps, layers = images, int(math.log2(patch))
    for layer in range(layers):
        channels = 48 // 2 ** (layers - 1 - layer)
        groups = max(count for count in range(1, 33) if 32 % count == 0 and channels % count == 0)
        maps = F.conv2d(maps, weights[f"convolutions.{layer}.weight"], stride=2, padding=1)
        assert maps.shape[1] == channels
        parts = maps.reshape(2, groups, -1)
        parts = (parts - parts.mean(-1, keepdim=True)) / (parts.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        scale, shift = weights[f"norms.{layer}.weight"], weights[f"norms.{layer}.bias"]
        maps = (parts.reshape(maps.shape) * scale[:, None, None] + shift[:, None, None]).clamp(min=0)
    expected = torch.einsum("dc,bchw->bhwd", weights["project.weight"][:, :, 0, 0], maps) + weights["project.bias"]
    torch.testing.assert_close(stem(images), expected.reshape(2, 15, 48))
    assert len(weights) == 3 * layers + 2


def windows(maps: np.ndarray, kernel: int, stride: int, fill: float) -> np.ndarray:
    """Windows (b, h, w, c, kernel, kernel) of maps (b, h, w, c) under flax's "SAME" padding with `fill`."""
    pads = [(0, 0)]
    for side in maps.shape[1:3]:
        total = max((math.ceil(side / stride) - 1) * stride + kernel - side, 0)
        pads.append((total // 2, total - total // 2))
    padded = np.pad(maps, [*pads, (0, 0)], constant_values=fill)
    return sliding_window_view(padded, (kernel, kernel), (1, 2))[:, ::stride, ::stride]


def standard_convolution(maps: np.ndarray, kernel: np.ndarray, stride: int = 1) -> np.ndarray:
    """models_resnet.StdConv on maps (b, h, w, c) with a kernel (h, w, in, out)."""
    kernel = kernel - kernel.mean((0, 1, 2))
    kernel = kernel / (kernel.std((0, 1, 2)) + 1e-5)
    return np.einsum("bhwcpq,pqcd->bhwd", windows(maps, kernel.shape[0], stride, 0), kernel, optimize=True)


def group_norm(maps: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """flax.linen.GroupNorm with its defaults: 32 groups, epsilon 1e-6."""
    b, h, w, c = maps.shape
    groups = maps.reshape(b, h, w, 32, c // 32)
    mean, var = groups.mean((1, 2, 4), keepdims=True), groups.var((1, 2, 4), keepdims=True)
    return ((groups - mean) / np.sqrt(var + 1e-6)).reshape(b, h, w, c) * scale + bias


def hybrid_reference(weights: dict[str, np.ndarray], images: np.ndarray, stages: tuple[int, ...]) -> np.ndarray:
    """models_vit.py from its input (b, h, w, c) to the tokens, written from the source; kernels are HWIO."""

    def normed(maps, name):
        return group_norm(maps, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def convolved(maps, name, stride=1):
        return standard_convolution(maps, weights[f"{name}.weight"], stride)

    maps = np.maximum(normed(convolved(images, "root.conv", 2), "root.norm"), 0)
    maps = windows(maps, 3, 2, -np.inf).max((-2, -1))
    for stage, units in enumerate(stages):
        for unit in range(units):
            name, stride = f"stages.{stage}.{unit}", 2 if stage > 0 and unit == 0 else 1
            residual = maps
            if maps.shape[-1] != 64 * 2**stage * 4 or stride != 1:
                residual = normed(convolved(maps, f"{name}.shortcut_conv", stride), f"{name}.shortcut_norm")
            branch = np.maximum(normed(convolved(maps, f"{name}.conv1"), f"{name}.norm1"), 0)
            branch = np.maximum(normed(convolved(branch, f"{name}.conv2", stride), f"{name}.norm2"), 0)
            branch = normed(convolved(branch, f"{name}.conv3"), f"{name}.norm3")
            maps = np.maximum(residual + branch, 0)
    kernel = weights["project.weight"]
    p = kernel.shape[0]
    b, h, w, c = maps.shape
    patches = maps.reshape(b, h // p, p, w // p, p, c)
    tokens = np.einsum("bhpwqc,pqcd->bhwd", patches, kernel) + weights["project.bias"]
    return tokens.reshape(b, -1, kernel.shape[-1])


@pytest.mark.parametrize(
    ("stages", "patch", "size"),
    [
        ((), 4, (12, 20)),
        ((), 8, (24, 40)),
        ((2,), 4, (20, 12)),
        ((1, 2), 8, (24, 40)),
        ((1, 1, 2), 16, (48, 80)),
        ((1, 1), 16, (48, 16)),
        ((1, 1, 1), 32, (96, 32)),
    ],
)
def test_the_hybrid_stem_is_the_papers_resnet(stages, patch, size):
    stem = made("hybrid", patch=patch, stages=stages).double()
    images = pictures(2, 3, *size).double()
    weights = {key: value.detach() for key, value in stem.named_parameters()}
    weights = {key: (value.permute(2, 3, 1, 0) if value.ndim == 4 else value).numpy() for key, value in weights.items()}
    expected = hybrid_reference(weights, images.permute(0, 2, 3, 1).numpy(), stages)
    torch.testing.assert_close(stem(images), torch.from_numpy(expected), rtol=1e-9, atol=1e-9)
    tokens = stem.float()(images.float()).double().detach().numpy()
    assert np.abs(tokens - expected).max() < 2e-5 * np.abs(expected).max()


def test_weights_of_a_constant_filter_stay_finite():
    stem = made("hybrid", stages=())
    with torch.no_grad():
        stem.root.conv.weight[3] = 0.5
    assert stem(pictures(1, 3, 16, 16)).isfinite().all()


def test_the_r50_stem_has_as_many_parameters_as_timms():
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        theirs = timm.create_model("vit_base_r50_s16_224", num_classes=1000)
        stem = STEMS["hybrid"](ViTConfig(stem="hybrid"))
    count = sum(parameter.numel() for parameter in stem.parameters())
    assert count == sum(parameter.numel() for parameter in theirs.patch_embed.parameters())
    total = sum(parameter.numel() for parameter in theirs.parameters())
    assert round(total / 1e6, 2) == 98.66  # timm's published figure, so that the equality above is about this model
    linear = 16 * 16 * 3 * 768 + 768
    assert total - count + linear == 85_798_656 + 768 * 1000 + 1000  # the rest is ViT-B/16


# Another patch size.


@pytest.mark.parametrize(("old", "new"), [(16, 8), (8, 16), (4, 6), (6, 4), (16, 14), (14, 16), (7, 32)])
def test_resized_patches_are_timms(old, new):
    patch_embed = pytest.importorskip("timm.layers.patch_embed")
    stem = made("linear", patch=old, channels=2)
    weight = stem.project.weight.detach().reshape(32, old, old, 2).permute(0, 3, 1, 2)
    found = stem.resized(new, "bicubic")
    expected = patch_embed.resample_patch_embed(weight, [new, new], interpolation="bicubic", antialias=True)
    expected = expected.permute(0, 2, 3, 1).flatten(1)
    assert (found["project.weight"] - expected).abs().max() < 2e-5 * expected.abs().max()
    assert torch.equal(found["project.bias"], stem.project.bias)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("old", "new"), [(8, 16), (4, 6), (7, 8), (3, 9), (1, 4)])
def test_a_larger_patch_gives_an_enlarged_patch_the_token_it_had(old, new, interpolation):
    stem = made("linear", patch=old).double()
    larger = made("linear", patch=new).double()
    larger.load_state_dict(stem.resized(new, interpolation))
    patches = pictures(4, 3, old, old).double()
    enlarged = F.interpolate(patches, (new, new), mode=interpolation, antialias=True)
    torch.testing.assert_close(larger(enlarged), stem(patches), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_smaller_patch_has_the_weights_that_least_squares_give(interpolation):
    """For pixels that are independent, FlexiViT's (equation 4): the least mean square of the tokens' difference."""
    stem = made("linear", patch=6, channels=1).double()
    basis = torch.eye(36, dtype=torch.float64).reshape(36, 1, 6, 6)
    antialias = interpolation == "bicubic"  # timm's; big_vision's bilinear has none
    shrunk = F.interpolate(basis, (4, 4), mode=interpolation, antialias=antialias).reshape(36, 16)
    expected = torch.linalg.lstsq(shrunk, stem.project.weight.T).solution.T
    torch.testing.assert_close(stem.resized(4, interpolation)["project.weight"], expected)


def test_a_resized_state_dict_has_the_stems_dtype_and_leaves_the_stem_as_it_was():
    stem = made("linear", patch=8).bfloat16()
    found = stem.resized(4, "bilinear")
    assert {key: (value.shape, value.dtype) for key, value in found.items()} == {
        "project.weight": ((32, 48), torch.bfloat16),
        "project.bias": ((32,), torch.bfloat16),
    }
    assert not found["project.weight"].requires_grad
    assert stem.project.weight.shape == (32, 192)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_patch_size_keeps_the_weights(name):
    stem = made(name)
    found = stem.resized(8, "bilinear")
    assert found.keys() == stem.state_dict().keys()
    assert all(torch.equal(value, stem.state_dict()[key]) for key, value in found.items())


@pytest.mark.parametrize("name", ["overlap", "conv", "hybrid"])
def test_other_stems_refuse_another_patch_size(name):
    message = rf"^model\.stem {name} cannot change its patch size \(16 there, 8 here\)$"
    with pytest.raises(ValueError, match=message):
        made(name, patch=16).resized(8, "bicubic")
