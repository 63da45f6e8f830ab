from dataclasses import dataclass
from typing import ClassVar, get_args

import numpy as np
import pytest
import torch
from conftest import tiny_config

from mpp import draws, masks, targets
from mpp.models.cnn import ResNet
from mpp.models.resnet_config import ResNetConfig
from mpp.models.vit import ViT
from mpp.objectives.hiding import Hiding, embed_without, encoder_of_patches, mask_token
from mpp.objectives.hiding_config import HidingConfig, MaskName

CPU = torch.device("cpu")


def settings(**changes) -> HidingConfig:
    return HidingConfig(**{"name": "some"} | changes)


@dataclass(frozen=True)
class Up(HidingConfig):
    up: ClassVar[bool] = True


@dataclass(frozen=True)
class Everything(HidingConfig):
    everything: ClassVar[bool] = True


def seeded(draw):
    """What a function draws for 64 images of one step."""
    with draws.drawing(draws.keys_of(3, 5, np.arange(64))):
        return draw()


def test_configs_know_every_mask_there_is():
    assert set(get_args(MaskName)) == masks.MASKS.keys()


@pytest.mark.parametrize("name", get_args(MaskName))
def test_hidden_patches_are_those_of_the_mask_and_the_kept_ones_are_all_others(name):
    hiding = Hiding(settings(mask=name, share=0.6), (8, 12))
    hidden = seeded(lambda: hiding.draw(64, CPU))
    assert hidden.shape == (64, hiding.count)
    assert torch.equal(hidden, seeded(lambda: masks.MASKS[name].draw(64, (8, 12), hiding.count, CPU)))
    kept, dropped = seeded(lambda: hiding.split(64, CPU))
    assert (kept.shape, dropped.shape) == ((64, 96 - hiding.count), (64, hiding.count))
    for image in range(64):
        assert sorted([*kept[image].tolist(), *dropped[image].tolist()]) == list(range(96))
    if name != "random":
        assert torch.equal(dropped, hidden)


def test_a_random_split_is_an_order_of_which_the_first_are_kept():
    hiding = Hiding(settings(share=0.75), (4, 6))
    order = seeded(lambda: masks.random_order(64, 24, CPU))
    assert torch.equal(torch.cat(seeded(lambda: hiding.split(64, CPU)), 1), order)
    assert hiding.count == 18


@pytest.mark.parametrize(("name", "share", "grid", "near", "up"), [
    ("random", 0.5, (5, 5), 12, 13), ("random", 0.6, (14, 14), 118, 118), ("random", 0.9, (2, 5), 9, 9),
    ("random", 0.01, (4, 4), 1, 1), ("random", 0.7, (2, 5), 7, 7), ("units", 0.6, (14, 14), 120, 120),
])  # fmt: skip
def test_a_share_is_rounded_or_rounded_up(name, share, grid, near, up):
    assert Hiding(settings(mask=name, share=share), grid).count == near
    assert Hiding(Up("some", name, share), grid).count == up


def test_all_may_be_hidden_where_the_objective_says_so_and_at_random_alone():
    hidden = Hiding(Everything("some", "random", 1.0), (2, 3)).draw(4, CPU)
    assert torch.equal(hidden.sort(1).values, torch.arange(6).expand(4, -1))
    with pytest.raises(ValueError, match=r"objective.mask units, objective.share 1: .* nothing visible .* 2 x 4"):
        Hiding(Everything("some", "units", 1.0), (2, 4))
    with pytest.raises(ValueError, match=r"objective.share must be in \(0, 1\], got 1.5"):
        Everything("some", share=1.5)


@pytest.mark.parametrize(("name", "share", "grid", "words"), [
    ("random", 0.5, (1, 1), "a mask of 1 patches leaves nothing visible of a grid of 1 x 1"),
    ("random", 0.99, (4, 4), "a mask of 16 patches leaves nothing visible of a grid of 4 x 4"),
    ("units", 0.6, (7, 8), "units of 2 x 2 patches don't tile a grid of 7 x 8"),
    ("large_units", 0.9, (8, 4), "a mask of 32 patches leaves nothing visible of a grid of 8 x 4"),
    ("blocks", 0.4, (80, 1), "blocks of at least 7 patches .* don't fit .* of a grid of 80 x 1"),
    ("inverse_block", 0.1, (30, 2), "a visible block of 54 patches .* doesn't fit a grid of 30 x 2"),
])  # fmt: skip
def test_what_can_not_be_hidden_is_one_line_that_names_keys_and_grid(name, share, grid, words):
    with pytest.raises(ValueError, match=f"^objective.mask {name}, objective.share {share}: {words}") as caught:
        Hiding(settings(mask=name, share=share), grid)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, float("nan")])
def test_a_share_is_part_of_the_patches(share):
    with pytest.raises(ValueError, match=rf"objective.share must be in \(0, 1\), got {share}"):
        settings(share=share)


def test_an_encoder_without_patches_is_refused():
    with torch.device("meta"):
        cnn = ResNet(ResNetConfig(depth=18))
        with pytest.raises(ValueError, match=r"objective.name some needs an encoder of patches .*, got resnet"):
            encoder_of_patches(cnn, settings())


@pytest.mark.parametrize("stem", ["linear", "overlap", "conv"])
def test_hidden_patches_become_the_token_and_no_token_tells_of_their_pixels(stem):
    encoder = ViT(tiny_config(stem=stem))
    token = mask_token(encoder)
    assert token.shape == (64,)
    images = torch.randn(2, 3, 32, 48, requires_grad=True)
    hidden = torch.tensor([[0, 7, 8, 23], [3, 4, 5, 9]])
    tokens = embed_without(encoder, images, hidden, token)
    kept = torch.ones(2, 24, dtype=torch.bool).scatter(1, hidden, False)
    assert torch.equal(tokens[~kept], token.expand(8, -1))
    if stem == "linear":
        assert torch.equal(tokens[kept], encoder.embed(images)[kept])
    tokens[kept].square().sum().backward()
    felt = targets.patch_pixels(images.grad, 8).abs().sum(-1)  # (b, n)
    assert felt[~kept].eq(0).all()
    assert felt[kept].gt(0).all()
