import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torchvision.models import resnet18, resnet50

from mpp.models.cnn import ResNet, StandardisedConv2d
from mpp.models.resnet_config import ResNetConfig

SMALL = {"image": (32, 32), "depth": 18, "width": 8, "stem": "small"}


def small(**changes) -> ResNet:
    return shaken(ResNet(ResNetConfig(**SMALL | changes)))


def shaken(model: nn.Module) -> nn.Module:
    """A model whose norms are all different and, in evaluation, use statistics that matter."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.2, 0.2)
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    return model


def images(count: int = 4, side: int = 32) -> Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)


def lowered(model: nn.Module) -> dict[str, Tensor]:
    """What the training loop computes with on a CPU: all in bfloat16, but the parameters of batch norm (mpp.loop)."""
    norms = {id(p) for part in model.modules() if isinstance(part, nn.BatchNorm2d) for p in part.parameters()}
    return {name: p.bfloat16() for name, p in model.named_parameters() if id(p) not in norms}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("build", "depth", "width"), [(resnet18, 18, 512), (resnet50, 50, 2048)])
def test_torchvisions_weights_fit_and_give_its_vectors(build, depth, width, training):
    reference = shaken(build(weights=None)).double().train(training)
    reference.fc = nn.Identity()
    encoder = ResNet(ResNetConfig(depth=depth)).double().train(training)
    encoder.load_state_dict(reference.state_dict(), strict=True)
    normalised = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    vectors = encoder(normalised)
    assert encoder.width == vectors.shape[1] == width
    torch.testing.assert_close(vectors, reference(normalised), rtol=1e-9, atol=1e-9)


def test_initial_weights_are_kaimings_and_each_block_starts_as_the_identity():
    encoder = ResNet(ResNetConfig(depth=50, width=32))
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05), name
    maps = torch.rand(2, 128, 8, 8)  # not negative, as behind any block
    assert torch.equal(encoder.layer1[1](maps), maps)
    assert not torch.equal(shaken(encoder).layer1[1](maps), maps)


def test_uint8_images_are_normalised_inside():
    encoder = small(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3)).eval()
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)
    pixels = images()
    torch.testing.assert_close(encoder(pixels), encoder((pixels / 255 - mean) / std), rtol=1e-4, atol=1e-5)


def test_the_small_stem_keeps_the_resolution_and_tokens_are_the_third_stages_positions():
    for config, side, first in (
        (SMALL, 32, 32),
        ({"image": (64, 96), "depth": 18, "width": 8}, 64, 16),
    ):
        encoder, seen = ResNet(ResNetConfig(**config)).eval(), {}
        for stage in (encoder.layer1, encoder.layer3):
            stage.register_forward_hook(lambda module, _, maps, seen=seen: seen.__setitem__(module, maps.shape[2:]))
        encoder(torch.zeros(1, 3, *config["image"]))
        assert seen[encoder.layer1] == (first, first * config["image"][1] // side)
        assert encoder.tokens == math.prod(seen[encoder.layer3])


@pytest.mark.parametrize("side", [3, 1])
def test_standardised_filters_have_mean_0_and_variance_1(side):
    conv = StandardisedConv2d(6, 5, side, 2, side // 2, bias=False)
    with torch.no_grad():
        conv.weight.mul_(3).add_(0.7)
    standard = torch.empty_like(conv.weight)
    for number, weights in enumerate(conv.weight.detach()):
        standard[number] = (weights - weights.mean()) / weights.std(correction=0)
    maps = torch.randn(2, 6, 9, 9)
    torch.testing.assert_close(conv(maps), F.conv2d(maps, standard, None, 2, side // 2))


def test_group_norm_comes_with_standardised_convolutions_and_groups_that_divide():
    encoder = small(norm="group", width=24)
    kinds = [type(module) for module in encoder.modules()]
    assert nn.BatchNorm2d not in kinds
    assert nn.Conv2d not in kinds
    assert [encoder.bn1.num_groups, encoder.layer3[0].bn2.num_groups] == [8, 32]  # of 24 and 96 channels
    batch = small().state_dict().keys()
    assert encoder.state_dict().keys() == {name for name in batch if "running" not in name and "tracked" not in name}


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_looks_across_batch_says_whether_a_vector_depends_on_the_other_images(norm):
    encoder, pixels = small(norm=norm), images(4)
    alone, among = encoder(pixels[:2])[0], encoder(pixels)[0]
    assert torch.allclose(alone, among, atol=1e-5) != encoder.looks_across_batch


def test_layers_are_the_stem_and_four_stages():
    encoder = small()
    assert encoder.layers == 4
    expected = {"conv1": 0, "bn1": 0, "layer1": 1, "layer2": 2, "layer3": 3, "layer4": 4}
    found = {name: encoder.layer_of(name) for name, _ in encoder.named_parameters()}
    assert found == {name: expected[name.split(".")[0]] for name in found}
    assert set(found.values()) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_the_training_loops_bfloat16_pass_is_close_to_float32(norm):
    encoder, pixels = small(norm=norm, width=16), images(16)
    towards = torch.randn(16, encoder.width)
    exact = encoder(pixels)
    (exact * towards).mean().backward()
    gradients = [parameter.grad.clone() for parameter in encoder.parameters()]
    buffers = {name: b.clone() for name, b in encoder.named_buffers() if name.endswith("running_mean")}
    encoder.zero_grad()
    vectors = functional_call(encoder, lowered(encoder), (pixels,))
    (vectors.float() * towards).mean().backward()
    assert vectors.dtype == torch.bfloat16
    assert torch.cosine_similarity(vectors.float(), exact).min() > 0.99
    found = torch.cat([parameter.grad.flatten() for parameter in encoder.parameters()])
    expected = torch.cat([gradient.flatten() for gradient in gradients])
    assert found.dtype == torch.float32
    assert torch.cosine_similarity(found, expected, dim=0) > 0.9  # autocast gives 0.94 to 0.95
    for name, before in buffers.items():  # a second pass over the same images moves the statistics on
        assert encoder.get_buffer(name).dtype == torch.float32
        assert not torch.equal(encoder.get_buffer(name), before), name


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_autocast_gives_nearly_the_same_vectors(norm):
    encoder, pixels = small(norm=norm).eval(), images()
    with torch.autocast("cpu", torch.bfloat16):
        low = encoder(pixels)
    assert torch.cosine_similarity(low.float(), encoder(pixels)).min() > 0.99


def test_an_encoder_takes_any_size_of_image_and_says_which_channels_it_wants():
    encoder = small().eval()
    assert encoder(images(2, 17)).shape == (2, 64)
    with pytest.raises(ValueError, match="takes 3 channels, got images with 1"):
        encoder(torch.zeros(1, 1, 32, 32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 20}, "model.depth must be one of 18, 34, 50, 101, got 20"),
        ({"width": 0}, "model.width must be 1 to 10000, got 0"),
        ({"stem": "tiny"}, "model.stem must be one of imagenet, small, got 'tiny'"),
        ({"norm": "layer"}, "model.norm must be one of batch, group, got 'layer'"),
        ({"image": (0, 32)}, "model.image must be at least 1x1"),
        ({"std": (0.0,)}, "model.std must be positive"),
    ],
)
def test_a_wrong_setting_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        ResNetConfig(**changes)
