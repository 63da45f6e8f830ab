import math
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import shaken, tiny_config
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mpp.models.layers import put, take
from mpp.models.mixers import MIXERS, Places
from mpp.models.positions import POSITIONS
from mpp.models.resnet_config import ResNetConfig
from mpp.models.stems import STEMS
from mpp.models.trunk import Trunk
from mpp.models.trunk_config import MIXER_NAMES, ON_GRID, TrunkConfig
from mpp.models.vit import ViT
from mpp.models.vit_config import OVERLAPPING

GRID, N, WIDTH, CONTEXT = (4, 6), 24, 64, 40  # patches, channels of the tokens and of their context
NOWHERE = -1


def config_of(**changes) -> TrunkConfig:
    return TrunkConfig(**{"width": WIDTH, "depth": 2, "heads": 2} | changes)


def trunk_of(**changes) -> Trunk:
    return shaken(Trunk(config_of(**changes), GRID, CONTEXT)).eval()


def drawn(count: int = N, of: int = N) -> Tensor:
    """Different numbers below `of` for each of two images, (2, count)."""
    return torch.rand(2, of).argsort(1)[:, :count]


def context_of() -> dict[str, Tensor]:
    """A context of nine tokens an image: two without a place and seven patches."""
    return {
        "context": torch.randn(2, 9, CONTEXT),
        "context_at": torch.cat([torch.full((2, 2), NOWHERE), drawn(7)], dim=1),
    }


# A slow and obvious trunk: float64, one image, one query at a time


def turned(vector: np.ndarray, place: int) -> np.ndarray:
    """A query or key (head,) turned by DINOv3's rotary positions: a pair of channels by its row, the next by column."""
    if place < 0:
        return vector
    half, quarter, found = len(vector) // 2, len(vector) // 4, vector.copy()
    for pair in range(half):
        axis, frequency = divmod(pair, quarter)
        centre = (2 * divmod(place, GRID[1])[axis] + 1) / GRID[axis] - 1
        angle = 2 * math.pi * centre / 100 ** (frequency / quarter)
        a, b = vector[pair], vector[pair + half]
        found[pair] = a * math.cos(angle) - b * math.sin(angle)
        found[pair + half] = b * math.cos(angle) + a * math.sin(angle)
    return found


def slow_encode(trunk: Trunk, tokens: Tensor, places: list[int], context: Tensor, context_places: list[int], sees=None):
    """What `encode` gives for one image's kept patch tokens (k, d), at these places, (prefix + k, d) in numpy.

    sees: whether a token at one place sees that at another one, places in front being NOWHERE; all do where not given.
    """
    config = trunk.config
    weights = {name: value.detach().double().numpy() for name, value in trunk.state_dict().items()}
    head, rope = config.width // config.heads, config.positions == "rope"

    def linear(values, name):
        return values @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(values, name):
        centred = values - values.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + config.norm_eps)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def gelu(values):
        return values * 0.5 * (1 + np.vectorize(math.erf)(values / math.sqrt(2)))

    def attended(queries, at, keys, values, key_places, name):
        found = np.zeros_like(queries)
        for number in range(config.heads):
            part = slice(number * head, (number + 1) * head)
            q, k, v = queries[:, part], keys[:, part], values[:, part]
            if config.qk_norm:
                q, k = norm(q, f"{name}.norm_q"), norm(k, f"{name}.norm_k")
            if rope:
                q = np.stack([turned(*pair) for pair in zip(q, at, strict=True)])
                k = np.stack([turned(*pair) for pair in zip(k, key_places, strict=True)])
            for query in range(len(q)):
                seen = [key for key in range(len(k)) if sees is None or sees(at[query], key_places[key])]
                scores = np.exp([q[query] @ k[key] / math.sqrt(head) for key in seen])
                found[query, part] = sum(s * v[key] for s, key in zip(scores / scores.sum(), seen, strict=True))
        return linear(found, f"{name}.project")

    stream, context = tokens.double().numpy(), context.double().numpy()
    if config.positions == "learned":
        stream = stream + weights["positions.table"][places]
    front = [weights["registers"]] if config.registers else []
    stream, places = np.concatenate([*front, stream]), [NOWHERE] * config.registers + places
    for block, mixer in enumerate(config.mixers):
        name = f"blocks.{block}"
        normed, mix = norm(stream, f"{name}.norm1"), f"{name}.mixer"
        if mixer == "cross":
            k, v = np.split(linear(context, f"{mix}.kv"), 2, axis=1)
            mixed = attended(linear(normed, f"{mix}.query"), places, k, v, context_places, mix)
        else:
            q, k, v = np.split(linear(normed, f"{mix}.qkv"), 3, axis=1)
            mixed = attended(q, places, k, v, places, mix)
        stream = stream + mixed
        mapped = gelu(linear(norm(stream, f"{name}.norm2"), f"{name}.mlp.expand"))
        stream = stream + linear(mapped, f"{name}.mlp.contract")
    return norm(stream, "norm")


ALTERNATING = ("cross", "attention", "cross", "attention")
CHOICES = [
    *product([("cross",), ("cross", "attention")], ["none", "learned", "rope"], [False, True], [0, 3]),
    (("attention",), "rope", True, 3),
    (ALTERNATING, "rope", False, 0),
]


@pytest.mark.parametrize(("mixer", "positions", "qk_norm", "registers"), CHOICES)
def test_a_trunk_computes_plain_softmax_attention_of_its_tokens_and_their_context(mixer, positions, qk_norm, registers):
    depth = max(2, len(mixer))
    trunk = trunk_of(mixer=mixer, positions=positions, qk_norm=qk_norm, registers=registers, depth=depth)
    assert trunk.config.mixers == (mixer if len(mixer) > 1 else mixer * 2)
    tokens, keep, given = torch.randn(2, N, WIDTH), drawn(10), context_of()
    context = given if "cross" in mixer else {}
    at, rows = keep[:, [7, 2, 2]], [registers + 7, registers + 2, registers + 2]
    whole, kept = trunk.encode(tokens, **context), trunk.encode(tokens, keep, **context)
    asked = trunk.encode(tokens, keep, at=at, **context)
    for image in range(2):
        of_context = given["context"][image], given["context_at"][image].tolist()
        expected = slow_encode(trunk, tokens[image], list(range(N)), *of_context)
        np.testing.assert_allclose(whole[image].detach().numpy(), expected, atol=5e-5)
        expected = slow_encode(trunk, tokens[image, keep[image]], keep[image].tolist(), *of_context)
        np.testing.assert_allclose(kept[image].detach().numpy(), expected, atol=5e-5)
        np.testing.assert_allclose(asked[image].detach().numpy(), expected[rows], atol=5e-5)


# Outputs asked for


MIXED = [("attention",), ("cross", "attention"), ("attention", "cross"), ("identity",)]
REFUSED = [
    *(("relative", mixer) for mixer in MIXED[1:]),
    *((positions, ("identity",)) for positions in ("rope", "rope_capi")),
]


@pytest.mark.parametrize(
    ("positions", "mixer"), [choice for choice in product(POSITIONS, MIXED) if choice not in REFUSED]
)
def test_outputs_asked_for_among_kept_patches_are_those_of_all_kept_ones(positions, mixer):
    registers = 0 if mixer == ("identity",) else 4
    trunk = trunk_of(mixer=mixer, positions=positions, registers=registers)
    tokens, keep = torch.randn(2, N, WIDTH), drawn(10)
    context = context_of() if "cross" in mixer else {}
    whole = trunk.encode(tokens, keep, **context)
    rows = drawn(6, of=10)
    found = trunk.encode(tokens, keep, at=keep.gather(1, rows), **context)
    torch.testing.assert_close(found, take(trunk.patches(whole), rows), atol=1e-5, rtol=1e-5)
    if registers:  # those in front are counted from -prefix on, among patches or alone
        at = torch.cat([torch.tensor([[-4, -1]]).expand(2, -1), keep[:, :1]], dim=1)
        expected = torch.cat([whole[:, [0, 3]], trunk.patches(whole)[:, :1]], dim=1)
        torch.testing.assert_close(trunk.encode(tokens, keep, at=at, **context), expected, atol=1e-5, rtol=1e-5)


def test_an_encoder_gives_outputs_of_kept_patches_for_another_grid_too(tiny_vit):
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    tokens, keep = tiny_vit.embed(images), drawn(10, of=25)
    expected = take(tiny_vit.patches(tiny_vit.encode(tokens, keep, grid=(5, 5))), torch.tensor([[9, 0], [3, 4]]))
    at = keep.gather(1, torch.tensor([[9, 0], [3, 4]]))
    torch.testing.assert_close(tiny_vit.encode(tokens, keep, at=at, grid=(5, 5)), expected, atol=1e-5, rtol=1e-5)


def test_a_patch_that_is_not_kept_is_refused_but_no_device_is_waited_for(tiny_vit):
    keep, at = torch.tensor([[3, 5, 8]]), torch.tensor([[5, 4]])
    with pytest.raises(ValueError, match="`at` has one that is not in `keep`"):
        tiny_vit.encode(torch.randn(1, N, WIDTH), keep, at=at)
    meta = ViT(tiny_config()).to("meta")
    parts = torch.empty(1, N, WIDTH, device="meta"), keep.to("meta")
    assert meta.encode(*parts, at=at.to("meta")).shape == (1, 2, WIDTH)
    crossing = Trunk(config_of(mixer="cross", positions="rope"), GRID, CONTEXT).to("meta")  # has no values to wait for
    context = {name: value[:1].to("meta") for name, value in context_of().items()}
    assert crossing.encode(*parts, at=at.to("meta"), **context).shape == (1, 2, WIDTH)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(torch.randn(1, N, WIDTH)), mode.from_tensor(keep)
        assert tiny_vit.encode(*fake, at=mode.from_tensor(at)).shape == (1, 2, WIDTH)


# Decoders and predictors


@pytest.mark.parametrize("mixer", ["attention", "cross"])
def test_a_trunk_learns_to_decode_what_an_encoder_saw_of_an_image(mixer):
    encoder = ViT(tiny_config(depth=1, pool="avg"))
    config = config_of(width=32, mixer=mixer, positions="sincos2d_mae")
    decoder, mask = Trunk(config, encoder.config.grid, context=WIDTH), nn.Parameter(torch.zeros(32))
    narrow, head = nn.Linear(WIDTH, 32), nn.Linear(32, 5)
    parts = nn.ModuleList([encoder, decoder, narrow, head])
    optimizer = torch.optim.Adam([*parts.parameters(), mask], 3e-3)
    images, truth, order = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8), torch.randn(2, 18, 5), drawn()
    keep, hidden, losses = order[:, :6], order[:, 6:], []
    for _ in range(60):
        seen = encoder.encode(encoder.embed(images), keep)
        if mixer == "attention":  # as MAE: kept tokens and [mask] in the places of all
            found = decoder.encode(put(mask.expand(2, N, -1), keep, narrow(seen)), at=hidden)
        else:  # as CrossMAE: [mask] alone, which look at the kept ones
            found = decoder.encode(mask.expand(2, N, -1), hidden, context=seen)
        loss = (head(found) - truth).square().mean()
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0], "the same guess everywhere leaves about three quarters"
    idle = {name for name, part in decoder.named_parameters() if part.grad is None or not part.grad.any()}
    assert not idle
    assert all(part.grad.any() for name, part in encoder.named_parameters() if not name.startswith("pool"))


def test_a_trunk_starts_with_the_papers_weights_whatever_its_context_is():
    trunk = Trunk(config_of(width=256, heads=4, mixer=("cross", "attention"), registers=2, layer_scale=0.1), GRID, 512)
    cross, own = (block.mixer for block in trunk.blocks)
    fans = {
        cross.query.weight: (256, 256),
        **dict.fromkeys(cross.kv.weight.chunk(2), (512, 256)),
        **dict.fromkeys(own.qkv.weight.chunk(3), (256, 256)),
        cross.project.weight: (256, 256),
    }
    for weight, (inputs, outputs) in fans.items():  # Xavier's uniform distribution
        assert weight.shape == (outputs, inputs)
        assert weight.std().item() == pytest.approx(math.sqrt(2 / (inputs + outputs)), rel=0.03)
    assert not any(linear.bias.any() for linear in (cross.query, cross.kv, cross.project))
    assert trunk.positions.table.std().item() == pytest.approx(0.02, rel=0.05)
    assert trunk.blocks[0].scale1.unique().item() == pytest.approx(0.1)
    names = {name.split(".")[0] for name, _ in trunk.named_parameters()}
    assert names == {"registers", "positions", "blocks", "norm"}, "neither stem nor pool"


@pytest.mark.parametrize("positions", ["learned", "rope", "rope_capi"])
def test_the_order_of_a_context_does_not_matter_if_its_places_go_with_it(positions):
    trunk, tokens = trunk_of(mixer="cross", positions=positions, registers=4), torch.randn(2, N, WIDTH)
    given, order = context_of(), torch.randperm(9)
    expected = trunk.encode(tokens, **given)
    found = trunk.encode(tokens, **{name: value[:, order] for name, value in given.items()})
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    moved = trunk.encode(tokens, context=given["context"], context_at=given["context_at"].roll(1, 1))
    assert torch.allclose(moved, expected, atol=1e-5) == (positions == "learned")


def test_recomputing_blocks_gives_the_same_gradients_of_tokens_and_context():
    trunk = trunk_of(mixer=("cross", "attention"), positions="rope")
    tokens, given = torch.randn(2, N, WIDTH, requires_grad=True), context_of()
    given["context"].requires_grad_()
    inputs = [tokens, given["context"], *trunk.parameters()]
    found = []
    for recompute in (False, True):
        trunk.activation_checkpointing = recompute
        found.append(torch.autograd.grad(trunk.encode(tokens, **given).square().sum(), inputs))
    for one, other in zip(*found, strict=True):
        assert one.any()
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_in_bfloat16_it_is_near_float32_and_compiled_the_same(positions):
    trunk, tokens, keep = (
        trunk_of(mixer=("cross", "attention"), positions=positions),
        torch.randn(2, N, WIDTH),
        drawn(10),
    )
    given, at = context_of(), keep[:, 3:6]
    exact = trunk.encode(tokens, keep, at=at, **given)
    torch._dynamo.reset()
    compiled = torch.compile(trunk.encode, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens, keep, at=at, **given), exact, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert (trunk.encode(tokens, keep, at=at, **given) - exact).abs().max() < 0.08 * exact.abs().max()
    found = trunk.bfloat16().encode(tokens.bfloat16(), keep, at=at, **given)  # the context is cast as well
    assert found.dtype == torch.bfloat16
    assert (found - exact).abs().max() < 0.08 * exact.abs().max()


# What can't be


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"heads": 5}, r"trunk.width \(64\) must be a multiple of trunk.heads \(5\)"),
        ({"depth": 0}, "trunk.depth must be 1 to 1000, got 0"),
        ({"mlp": 0}, "trunk.mlp must be 1 to 1000000, got 0"),
        ({"mixer": "crosswise"}, "trunk.mixer must be of attention, cross, .*, got 'crosswise'"),
        ({"mixer": ("cross", "pool", "cross")}, r"trunk.mixer needs 1 to 2 names \(trunk.depth\), got 3"),
        ({"mixer": "cross", "positions": "relative"}, "trunk.positions relative .* trunk.mixer cross"),
        ({"mixer": ("cross", "attention"), "positions": "relative"}, "trunk.positions relative .* trunk.mixer cross"),
        ({"mixer": "pool", "positions": "rope"}, "trunk.positions rope work inside attention, and trunk.mixer is pool"),
        ({"mixer": "pool", "class_token": True}, "a class token needs attention in some block; mixer pool"),
        ({"mixer": "pool", "registers": 1}, "registers needs attention in some block; mixer pool"),
        ({"gelu": "relu"}, "trunk.gelu must be one of erf, tanh, quick, got 'relu'"),
        ({"dropout": 1.0}, r"trunk.dropout must be in \[0, 1\), got 1.0"),
        ({"width": 62, "positions": "sincos2d_mae"}, "trunk.positions sincos2d_mae needs a trunk.width that 4 divides"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_by_name(changes, expected):
    with pytest.raises(ValueError, match=expected) as caught:
        config_of(**changes)
    assert "\n" not in str(caught.value)


def test_an_encoder_has_no_context_and_a_trunk_has_patches():
    for pool in ("cls", "avg"):
        with pytest.raises(ValueError, match="model.mixer cross looks at the tokens of an encoder"):
            tiny_config(mixer=("cross", "attention"), pool=pool)
    with pytest.raises(ValueError, match="a grid of at least 1x1 patches, got 0x3"):
        Trunk(config_of(), (0, 3))


@pytest.mark.parametrize(
    ("settings", "arguments", "expected"),
    [
        ({}, {"context": torch.zeros(2, 9, CONTEXT)}, "got a context, and trunk.mixer attention looks at none"),
        ({"mixer": ("pool", "cross")}, {}, r"trunk.mixer pool/cross needs encode\(context=...\)"),
        ({}, {"context_at": torch.zeros(2, 9)}, "got `context_at` without the `context`"),
        ({"mixer": "cross"}, {"context": torch.zeros(2, 9, 41)}, "a context of 40 channels, got 41"),
        (
            {"mixer": "cross"},
            {"context": torch.zeros(2, 9, CONTEXT), "context_at": torch.zeros(2, 8)},
            r"`context_at` of shape \(2, 9\), as its context, got \(2, 8\)",
        ),
        (
            {"mixer": "cross", "positions": "rope"},
            {"context": torch.zeros(2, 9, CONTEXT)},
            r"trunk.positions rope turn queries and keys, which needs encode\(context_at=...\)",
        ),
        ({}, {"at": torch.zeros(2, 1), "layers": [0]}, "encode takes `at` or `layers`, not both"),
        ({}, {"grid": (5, 5)}, "24 tokens do not fill a grid of 5x5 patches"),
        ({"mixer": ("conv", "attention")}, {"keep": torch.zeros(2, 3)}, "trunk.mixer conv needs the whole grid, so no"),
        ({"mixer": "mlp"}, {"grid": (3, 8)}, "trunk.mixer mlp has weights for a grid of 4x6 patches only"),
    ],
)
def test_what_does_not_fit_the_settings_is_refused_in_one_line(settings, arguments, expected):
    with pytest.raises(ValueError, match=expected) as caught:
        trunk_of(**settings).encode(torch.randn(2, N, WIDTH), **arguments)
    assert "\n" not in str(caught.value)


# Which encoders can do without some of the patches


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("mixer", [name for name in MIXER_NAMES if name != "cross"])
def test_an_encoder_says_why_it_can_not_do_without_some_patches(mixer, stem):
    config = tiny_config(stem=stem, stages=(1,), mixer=(mixer, "attention"), pool="avg")
    if mixer in ON_GRID:
        expected = f"model.mixer {mixer} needs the whole grid"
    elif stem != "linear":
        expected = f"model.stem {stem} shows a token the pixels of other patches"
    else:
        expected = None
    assert config.undroppable == expected
    assert ViT(config).undroppable == expected
    tokens, keep = torch.randn(2, N, WIDTH), drawn(5)
    if mixer in ON_GRID:
        with pytest.raises(ValueError, match=f"^{expected}, so no patches can be dropped$"):
            ViT(config).encode(tokens, keep)
    else:  # the blocks of any stem can
        assert ViT(config).encode(tokens, keep).shape == (2, 5, WIDTH)


def test_stems_overlap_as_their_settings_say_and_a_resnet_has_no_patches():
    assert {name for name, stem in STEMS.items() if stem.overlaps} == set(OVERLAPPING)
    assert ResNetConfig().undroppable == "model.name resnet has no patches"
    assert set(MIXERS) == set(MIXER_NAMES)


@pytest.mark.parametrize(
    "wrong",
    [
        {"layers": []},
        {"layers": [-1]},
        {"layers": [0, 99]},
        {"keep": torch.zeros(1, 3, dtype=torch.int64)},
        {"keep": torch.zeros(2, dtype=torch.int64)},
        {"at": torch.zeros(3, 3, dtype=torch.int64)},
    ],
)
def test_arguments_for_other_images_or_other_blocks_are_refused(wrong):
    with pytest.raises(ValueError, match="encode needs"):
        trunk_of().encode(torch.randn(2, N, WIDTH), **wrong)


def test_the_decoder_of_the_page_runs_as_it_is_printed():
    page = (Path(__file__).parents[1] / "docs/models.md").read_text()
    [code] = [block for block in re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S) if "TrunkConfig" in block]
    names: dict = {}
    exec(code.replace("decoder.encode(", "found = decoder.encode("), names)
    assert names["found"].shape == (2, 48, 64)


def test_layer_scale_keeps_the_stream_in_bfloat16():
    """Autocast casts no product, so that float32 scales would make the stream float32 from the first block on."""
    trunk = Trunk(config_of(layer_scale=0.1), GRID)
    tokens = torch.randn(2, N, WIDTH, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert trunk.blocks[0](tokens, Places(GRID, 0)).dtype == torch.bfloat16


@pytest.mark.parametrize("positions", ["learned", "sincos2d_mae", "relative", "rope"])
def test_tokens_that_a_trunk_is_given_stand_where_its_own_would(positions):
    own = trunk_of(positions=positions, registers=2)
    given = Trunk(config_of(positions=positions), GRID, front=2).eval()
    state = own.state_dict()
    front = state.pop("registers")
    given.load_state_dict(state)
    tokens, at = torch.randn(2, N, WIDTH), drawn(5)
    for options in ({}, {"at": at}, {"keep": at}):
        found = given.encode(tokens, **options, front=front.expand(2, -1, -1))
        torch.testing.assert_close(found, own.encode(tokens, **options))
    other = given.encode(tokens, front=torch.randn(2, 2, WIDTH))
    assert not torch.allclose(other[0, 2:], own.encode(tokens)[0, 2:], atol=1e-3), "the patches look at them"


def test_tokens_in_front_must_be_those_that_a_trunk_is_to_be_given():
    tokens, given = torch.randn(2, N, WIDTH), Trunk(config_of(), GRID, front=2)
    with pytest.raises(ValueError, match=r"encode needs `front` of shape \(2, 2, 64\), .* got none"):
        given.encode(tokens)
    with pytest.raises(ValueError, match=r"encode needs `front` of shape \(2, 2, 64\), .* got \(2, 1, 64\)"):
        given.encode(tokens, front=tokens[:, :1])
    with pytest.raises(ValueError, match="encode got `front`, and this trunk has its own tokens"):
        trunk_of().encode(tokens, front=tokens[:, :1])
    for own, config in {"class_token": {"class_token": True}, "registers": {"registers": 1}}.items():
        with pytest.raises(ValueError, match=f"^trunk.{own}: the tokens in front of this trunk's patches"):
            Trunk(config_of(**config), GRID, front=1)


def test_tokens_of_some_patches_must_say_which_they_are():
    trunk, tokens, keep = Trunk(config_of(), GRID), torch.randn(2, 3, WIDTH), torch.tensor([[0, 2, 1], [4, 3, 5]])
    with pytest.raises(ValueError, match="3 tokens do not fill a grid"):
        trunk.encode(tokens)
    with pytest.raises(ValueError, match=r"encode needs `places` of shape \(2, 3\), one of each token, got \(2, 2\)"):
        trunk.encode(tokens, places=keep[:, :2])
    with pytest.raises(ValueError, match="encode takes `keep` or `places`, not both"):
        trunk.encode(tokens, keep, places=keep)
