from functools import partial

import numpy as np
import pytest
import torch
from conftest import shaken, tiny_config
from test_models_trunk import GRID, NOWHERE, WIDTH, N, config_of, drawn, slow_encode, trunk_of

from mpp.models.layers import take
from mpp.models.positions import POSITIONS
from mpp.models.trunk import Trunk
from mpp.models.trunk_config import MIXER_NAMES
from mpp.models.vit import ViT

FREE = [0, 1, 7, N, torch.tensor([0, 13]), torch.tensor([N, 1])]
ids = [str(free if isinstance(free, int) else free.tolist()) for free in FREE]


def sees(query: int, key: int, free: int) -> bool:
    """Whether a token at one place sees that at another: what stands in front, what is free, itself, what is before."""
    return key == NOWHERE or key < free or key <= query


def of_image(free, image: int) -> int:
    return int(free if isinstance(free, int) else free[image])


# Against a slow trunk


@pytest.mark.parametrize("causal", FREE, ids=ids)
@pytest.mark.parametrize(("positions", "registers"), [("none", 0), ("learned", 1), ("rope", 3)])
def test_a_token_attends_to_the_free_prefix_itself_and_what_is_before_it(positions, registers, causal):
    trunk = trunk_of(positions=positions, registers=registers, qk_norm=registers == 3)
    tokens, keep = torch.randn(2, N, WIDTH), drawn(10)
    whole, kept = trunk.encode(tokens, causal=causal), trunk.encode(tokens, keep, causal=causal)
    at = torch.tensor([[23, 0, 9, -1][: 3 + (registers > 0)]]).expand(2, -1)
    asked, among = (
        trunk.encode(tokens, at=at, causal=causal),
        trunk.encode(tokens, keep, at=keep[:, 3:5], causal=causal),
    )
    layers = trunk.encode(tokens, layers=[0, 1], causal=causal)
    torch.testing.assert_close(trunk.norm(layers[1]), whole)
    torch.testing.assert_close(asked, take(whole, at + registers), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(among, kept[:, registers + 3 : registers + 5], atol=1e-5, rtol=1e-5)
    for image in range(2):
        rule = partial(sees, free=of_image(causal, image))
        for found, numbers in ((whole, torch.arange(N)), (kept, keep[image])):
            expected = slow_encode(trunk, tokens[image, numbers], numbers.tolist(), torch.zeros(0), [], rule)
            np.testing.assert_allclose(found[image].detach().numpy(), expected, atol=5e-5)


# What a patch knows of


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("causal", [0, 5, torch.tensor([5])], ids=["plain", "prefix", "drawn"])
def test_what_is_behind_a_patch_changes_nothing_at_it_and_what_is_before_does(causal, positions):
    trunk = trunk_of(positions=positions, registers=4, class_token=positions != "rope_capi").double()
    tokens = torch.randn(1, N, WIDTH).double()
    before = trunk.patches(trunk.encode(tokens, causal=causal))
    for changed in (0, 3, 9, N - 1):
        other = tokens.clone()
        other[:, changed] = torch.randn(WIDTH).double()
        differs = (trunk.patches(trunk.encode(other, causal=causal)) != before).any(-1)[0]
        free = changed < of_image(causal, 0)
        assert differs.tolist() == [free or patch >= changed for patch in range(N)], changed


def test_no_gradient_comes_from_what_is_behind_a_patch():
    trunk, tokens = trunk_of(positions="relative", registers=1), torch.randn(2, N, WIDTH, requires_grad=True)
    trunk.encode(tokens, causal=torch.tensor([0, 12]))[:, 1 + 8].sum().backward()
    felt = tokens.grad.abs().sum(-1) > 0
    assert felt.tolist() == [[patch <= 8 for patch in range(N)], [patch < 12 for patch in range(N)]]


def test_all_patches_in_the_prefix_is_the_encoder_as_it_is_used_afterwards(tiny_vit):
    tokens = torch.randn(2, N, WIDTH)
    expected = tiny_vit.encode(tokens)
    torch.testing.assert_close(tiny_vit.encode(tokens, causal=N), expected)
    assert not torch.allclose(tiny_vit.encode(tokens, causal=N // 2), expected, atol=1e-3)


def test_it_works_for_another_grid(tiny_vit):
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    tokens = tiny_vit.embed(images)
    found = tiny_vit.encode(tokens, grid=(5, 5), causal=2)
    other = tiny_vit.encode(torch.cat([tokens[:, :-1], torch.randn(2, 1, WIDTH)], dim=1), grid=(5, 5), causal=2)
    assert torch.equal(found[:, :-1], other[:, :-1])
    assert not torch.equal(found[:, -1], other[:, -1])


# Precision, compiling, recomputing


@pytest.mark.parametrize("causal", [0, torch.tensor([0, 13])], ids=["plain", "drawn"])
@pytest.mark.parametrize("registers", [0, 4])
def test_in_bfloat16_it_is_near_float32_and_compiled_and_recomputed_the_same(registers, causal):
    trunk, tokens = trunk_of(positions="rope", registers=registers), torch.randn(2, N, WIDTH)
    exact = trunk.encode(tokens, causal=causal)
    torch._dynamo.reset()
    compiled = torch.compile(trunk.encode, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens, causal=causal), exact, atol=1e-5, rtol=1e-5)
    trunk.activation_checkpointing = True
    torch.testing.assert_close(trunk.encode(tokens, causal=causal), exact)
    double = trunk_of(positions="rope", registers=registers).double()
    double.load_state_dict(trunk.state_dict())
    torch.testing.assert_close(double.encode(tokens.double(), causal=causal).float(), exact, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert (trunk.encode(tokens, causal=causal) - exact).abs().max() < 0.08 * exact.abs().max()
    at = torch.tensor([[2, 20]]).expand(2, -1)
    found = trunk.bfloat16().encode(tokens.bfloat16(), causal=causal, at=at)
    assert found.dtype == torch.bfloat16
    assert (found - take(trunk.patches(exact), at)).abs().max() < 0.08 * exact.abs().max()


def test_plain_order_is_left_to_the_kernel_that_makes_no_table_of_pairs(monkeypatch):
    asked = []
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v, bias, is_causal: (
            asked.append((bias is None, is_causal)) or real(q, k, v, bias, is_causal=is_causal)
        ),
    )
    tokens = torch.randn(2, N, WIDTH)
    trunk_of().encode(tokens, causal=0)
    trunk_of().encode(tokens, causal=1)  # its one free patch is the first, which all see in any case
    ViT(tiny_config()).encode(tokens, causal=0)  # and so is a class token
    assert asked == [(True, True)] * 6


# What can't be


@pytest.mark.parametrize("mixer", sorted({*MIXER_NAMES} - {"attention", "identity"}))
def test_other_mixers_are_refused_by_name(mixer):
    trunk = Trunk(config_of(mixer=("attention", mixer)), GRID)
    context = {"context": torch.randn(1, 2, WIDTH)} if mixer == "cross" else {}
    with pytest.raises(ValueError, match=f"^trunk.mixer {mixer} shows a patch what is behind it, so encode can't be"):
        trunk.encode(torch.randn(1, N, WIDTH), causal=0, **context)


def test_without_mixing_no_patch_sees_another():
    trunk, tokens = trunk_of(mixer="identity", positions="learned"), torch.randn(2, N, WIDTH)
    assert torch.equal(trunk.encode(tokens, causal=3), trunk.encode(tokens))


@pytest.mark.parametrize(
    ("causal", "found"),
    [
        (-1, "from 0 to 24, how many first patches all see, got -1"),
        (25, "from 0 to 24, how many first patches all see, got 25"),
        (True, "from 0 to 24, how many first patches all see, got True"),
        (torch.tensor(3), r"of shape \(2,\), whole numbers, got torch.int64 \(\)"),
        (torch.tensor([3]), r"of shape \(2,\), whole numbers, got torch.int64 \(1,\)"),
        (torch.tensor([3.0, 1.0]), r"of shape \(2,\), whole numbers, got torch.float32 \(2,\)"),
    ],
)
def test_what_is_no_number_of_patches_is_refused(causal, found):
    with pytest.raises(ValueError, match=f"^encode needs `causal` {found}$"):
        trunk_of().encode(torch.randn(2, N, WIDTH), causal=causal)


def test_an_encoder_says_why_its_tokens_know_of_what_is_behind_them():
    for changes, reason in [
        ({}, None),
        ({"mixer": ("attention", "conv")}, "model.mixer conv shows a patch what is behind it"),
        ({"stem": "overlap"}, "model.stem overlap shows a token the pixels of other patches"),
    ]:
        assert shaken(ViT(tiny_config(**changes))).config.unordered == reason


@torch.no_grad()
def test_a_causal_encoder_is_so_in_every_pass():
    plain, causal = (ViT(tiny_config(pool="avg", causal=causal)).eval() for causal in (False, True))
    causal.load_state_dict(plain.state_dict())
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    tokens = plain.encode(plain.embed(images), causal=0)
    assert torch.equal(causal.encode(causal.embed(images)), tokens)
    assert torch.equal(causal(images), plain.pool(tokens))
    assert not torch.equal(causal(images), plain(images))
    assert torch.equal(causal.encode(causal.embed(images), causal=24), plain.encode(plain.embed(images), causal=24))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pool": "cls"}, "model.causal shows a class token no patch, and model.pool cls reads it"),
        ({"pool": "cls_avg"}, "model.causal shows a class token no patch, and model.pool cls_avg reads it"),
        ({"pool": "avg", "mixer": ("conv",)}, "model.causal shows a patch those before it alone, and model.mixer conv"),
        ({"pool": "avg", "stem": "conv"}, "model.causal shows a patch those before it alone, and model.stem conv"),
    ],
)
def test_what_can_not_be_causal_is_refused_by_its_key(settings, words):
    with pytest.raises(ValueError, match=words):
        tiny_config(causal=True, **settings)
