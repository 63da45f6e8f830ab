import math

import numpy as np
import pytest
import torch
from conftest import shaken, tiny_config
from torch import Tensor, nn

from mpp.models.layers import take
from mpp.models.mixers import Places
from mpp.models.presets import presets
from mpp.models.vit import ViT
from mpp.models.vit_config import ViTConfig

THREE = Places((1, 3), 0)  # patches in a row
POOLS, POSITIONS = ["cls", "avg"], ["learned", "sincos2d", "none"]


def slow_forward(encoder: ViT, images: np.ndarray) -> np.ndarray:
    """The paper's equations 1 to 4 in numpy and loops, float64; gives all tokens of one image (c, h, w)."""
    config = encoder.config
    weights = {name: value.detach().double().numpy() for name, value in encoder.state_dict().items()}
    p, heads, size = config.patch, config.heads, config.width // config.heads

    def linear(tokens, name):
        return tokens @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(tokens, name):
        centred = tokens - tokens.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + config.norm_eps)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def gelu(values):
        return values * 0.5 * (1 + np.vectorize(math.erf)(values / math.sqrt(2)))

    pixels = images.astype(float) / 255
    pixels = (pixels - 0.5) / 0.5
    tokens = []
    for row in range(config.grid[0]):
        for column in range(config.grid[1]):
            square = pixels[:, p * row : p * row + p, p * column : p * column + p]
            tokens.append(linear(square.transpose(1, 2, 0).flatten(), "stem.project"))
    tokens = np.stack(tokens)
    if config.pool == "cls":
        tokens = np.concatenate([weights["class_token"][None], tokens])
    if config.positions == "learned":
        tokens = tokens + weights["positions.table"]
    for block in range(config.depth):
        name = f"blocks.{block}"
        qkv = linear(norm(tokens, f"{name}.norm1"), f"{name}.mixer.qkv")
        mixed = []
        for head in range(heads):
            q, k, v = (qkv[:, part * config.width + head * size :][:, :size] for part in range(3))
            scores = np.exp(q @ k.T / math.sqrt(size))
            mixed.append(scores / scores.sum(-1, keepdims=True) @ v)
        tokens = tokens + linear(np.concatenate(mixed, 1), f"{name}.mixer.project")
        tokens = tokens + linear(
            gelu(linear(norm(tokens, f"{name}.norm2"), f"{name}.mlp.expand")), f"{name}.mlp.contract"
        )
    return norm(tokens, "norm")


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("positions", ["learned", "none"])
def test_the_encoder_computes_the_papers_equations(pool, positions, batch):
    encoder = shaken(ViT(tiny_config(pool=pool, positions=positions)))
    tokens = encoder.encode(encoder.embed(batch.images))
    for found, image in zip(tokens, batch.images, strict=True):
        np.testing.assert_allclose(found.detach().numpy(), slow_forward(encoder, image.numpy()), atol=2e-5)


def test_class_token_and_average_stand_behind_one_another(batch):
    encoder = shaken(ViT(tiny_config(pool="cls_avg", registers=2)))
    tokens = encoder.encode(encoder.embed(batch.images))
    expected = torch.cat([tokens[:, 0], tokens[:, 3:].mean(1)], 1)
    assert encoder.width == expected.shape[1] == 2 * encoder.config.width
    torch.testing.assert_close(encoder(batch.images), expected)


@pytest.mark.parametrize("pool", POOLS)
def test_forward_is_pool_of_encode_of_embed(pool, batch):
    encoder = shaken(ViT(tiny_config(pool=pool)))
    tokens = encoder.encode(encoder.embed(batch.images))
    expected = tokens[:, 0] if pool == "cls" else tokens.mean(1)
    torch.testing.assert_close(encoder(batch.images), expected)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("positions", POSITIONS)
def test_asking_for_some_outputs_gives_those_of_the_whole(pool, positions, batch):
    encoder = shaken(ViT(tiny_config(pool=pool, positions=positions)))
    at = torch.rand(4, 24).argsort(1)[:, :7]
    tokens = encoder.embed(batch.images)
    expected = take(encoder.patches(encoder.encode(tokens)), at)
    torch.testing.assert_close(encoder.encode(tokens, at=at), expected, atol=1e-5, rtol=1e-5)


def test_dropped_patches_do_not_reach_the_others_and_positions_stay_with_theirs(tiny_vit, batch):
    keep = torch.rand(4, 24).argsort(1)[:, :9]
    tokens = tiny_vit.embed(batch.images)
    expected = tiny_vit.encode(tokens, keep)
    dropped = torch.ones(4, 24, dtype=torch.bool).scatter(1, keep, False)
    torch.testing.assert_close(tiny_vit.encode(tokens.masked_fill(dropped[..., None], 1e3), keep), expected)
    everything = torch.arange(24).flip(0).expand(4, -1)  # kept in another order: the same tokens in that order
    turned = tiny_vit.patches(tiny_vit.encode(tokens, everything))
    torch.testing.assert_close(turned, tiny_vit.patches(tiny_vit.encode(tokens)).flip(1), atol=1e-5, rtol=1e-5)


def test_the_outputs_of_blocks_end_in_the_encoders_own(tiny_vit, batch):
    tokens = tiny_vit.embed(batch.images)
    first, last = tiny_vit.encode(tokens, layers=[0, 1])
    torch.testing.assert_close(tiny_vit.norm(last), tiny_vit.encode(tokens))
    assert not torch.allclose(first, last)


def test_sincos_positions_are_big_visions_formula():
    positions = ViT(tiny_config(positions="sincos2d")).positions.patches((4, 6))
    for row, column, k in [(0, 0, 3), (3, 5, 0), (2, 4, 7), (1, 0, 15)]:
        omega = 1 / 10_000 ** (k / 15)  # width 64: 16 frequencies
        expected = [f(at * omega) for at in (column, row) for f in (math.sin, math.cos)]
        assert positions[6 * row + column, k::16].tolist() == pytest.approx(expected, abs=1e-6)


def test_learned_positions_follow_the_corners_to_another_grid():
    encoder = ViT(tiny_config(positions="learned"))
    rows = torch.linspace(0, 1, 4)[:, None].expand(4, 6)
    columns = torch.linspace(0, 1, 6).expand(4, 6)
    with torch.no_grad():
        encoder.positions.table[1:, 0], encoder.positions.table[1:, 1] = rows.flatten(), columns.flatten()
    resized = encoder.positions.patches((7, 5)).unflatten(0, (7, 5))
    torch.testing.assert_close(resized[..., 0], torch.linspace(0, 1, 7)[:, None].expand(7, 5))
    torch.testing.assert_close(resized[..., 1], torch.linspace(0, 1, 5).expand(7, 5))


@pytest.mark.parametrize("positions", POSITIONS)
def test_images_of_another_size_are_taken(positions):
    encoder = ViT(tiny_config(positions=positions))
    assert encoder(torch.zeros(2, 3, 40, 16, dtype=torch.uint8)).shape == (2, 64)


def test_what_does_not_fit_is_refused_by_name(tiny_vit):
    with pytest.raises(ValueError, match=r"multiples of the patch \(8\), got 30x48"):
        tiny_vit(torch.zeros(1, 3, 30, 48, dtype=torch.uint8))
    with pytest.raises(ValueError, match="takes 3 channels, got images with 1"):
        tiny_vit(torch.zeros(1, 1, 32, 48, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"model.image \(32, 30\) must be a multiple of model.patch \(8\)"):
        tiny_config(image=(32, 30))
    with pytest.raises(ValueError, match=r"model.width \(64\) must be a multiple of model.heads \(5\)"):
        tiny_config(heads=5)


@pytest.mark.parametrize("channels", [1, 5])
def test_any_number_of_channels_is_taken(channels):
    encoder = ViT(tiny_config(channels=channels, mean=(0.4,), std=(0.2,)))
    images = torch.randint(0, 256, (2, channels, 32, 48), dtype=torch.uint8)
    torch.testing.assert_close(encoder.normalise(images), (images / 255 - 0.4) / 0.2)
    assert encoder(images).shape == (2, 64)


def test_initial_weights_are_the_papers():
    encoder = ViT(ViTConfig(image=(64, 64), patch=16, width=256, depth=1, heads=4, mlp=1024))
    block = encoder.blocks[0]

    def uniform_std(fan_in, fan_out):  # Xavier's uniform distribution: variance 2 / (fan-in + fan-out)
        return math.sqrt(2 / (fan_in + fan_out))

    for part in block.mixer.qkv.weight.chunk(3):
        assert part.std().item() == pytest.approx(uniform_std(256, 256), rel=0.02)
        assert part.abs().max().item() <= math.sqrt(3) * uniform_std(256, 256)
    assert block.mlp.expand.weight.std().item() == pytest.approx(uniform_std(256, 1024), rel=0.02)
    assert block.mlp.expand.bias.std().item() == pytest.approx(1e-6, rel=0.1)
    assert encoder.stem.project.weight.std().item() == pytest.approx(1 / math.sqrt(768), rel=0.02)
    assert encoder.positions.table.std().item() == pytest.approx(0.02, rel=0.05)
    for zero in (encoder.class_token, encoder.stem.project.bias, block.mixer.qkv.bias, block.mixer.project.bias):
        assert not zero.any()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("Ti/16", 5_524_416), ("S/16", 21_665_664), ("B/16", 85_798_656), ("L/16", 303_301_632), ("H/14", 630_764_800)],
)
def test_presets_have_the_published_numbers_of_parameters(name, parameters):
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in ViT(presets[name]).parameters()) == parameters


@pytest.mark.parametrize("tokens", [5, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_attention_kernel_computes_softmax_attention(tokens, dtype):
    from mpp.models.mixers import attend

    q, k, v = torch.randn(3, 2, 3, tokens, 16).to(dtype)
    scores = torch.einsum("bhid,bhjd->bhij", q.double(), k.double()) / 4
    expected = torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v.double())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(attend(q, k, v).double(), expected, atol=tolerance, rtol=tolerance)


def test_no_module_is_without_a_use(tiny_vit, batch):
    tiny_vit(batch.images).square().sum().backward()
    idle = [
        name for name, parameter in tiny_vit.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert not idle


def test_layer_norms_have_the_papers_epsilon(tiny_vit: ViT):
    assert {module.eps for module in tiny_vit.modules() if isinstance(module, nn.LayerNorm)} == {1e-6}


def test_positions_none_make_a_bag_of_patches(batch):
    encoder = shaken(ViT(tiny_config(positions="none")))
    tokens: Tensor = encoder.embed(batch.images)
    torch.testing.assert_close(encoder.encode(tokens)[:, 0], encoder.encode(tokens.flip(1))[:, 0], atol=1e-5, rtol=1e-5)


# Regularisation in training


def silenced(encoder: ViT, *names: str) -> ViT:
    """The encoder without what these linear layers of its blocks give."""
    with torch.no_grad():
        for block in encoder.blocks:
            for name in names:
                for parameter in block.get_submodule(name).parameters():
                    parameter.zero_()
    return encoder


@pytest.mark.parametrize("branch", ["mixer.project", "mlp.contract"])
def test_drop_path_leaves_out_images_more_often_the_deeper_and_scales_the_others(branch):
    encoder = shaken(ViT(tiny_config(depth=4, width=16, drop_path=0.6)))
    silenced(encoder, *{"mixer.project", "mlp.contract"} - {branch})
    count, token = 4000, torch.randn(1, 3, 16)
    for number, block in enumerate(encoder.blocks):
        chance = 0.6 * number / 3
        whole = block.eval()(token, THREE) - token
        change = block.train()(token.expand(count, -1, -1), THREE) - token
        left_out = (change == 0).all(2).all(1)
        assert left_out.float().mean().item() == pytest.approx(chance, abs=4 * math.sqrt(0.25 / count))
        kept = change[~left_out]
        torch.testing.assert_close(kept, (whole / (1 - chance)).expand_as(kept), rtol=1e-4, atol=1e-5)


def test_both_branches_of_a_block_draw_for_themselves():
    block = shaken(ViT(tiny_config(depth=2, width=16, drop_path=0.5))).blocks[1].train()
    token = torch.randn(1, 3, 16)
    untouched = (block(token.expand(4000, -1, -1), THREE) == token).all(2).all(1).float().mean().item()
    assert untouched == pytest.approx(0.25, abs=0.03)


def test_dropout_drops_single_values_in_the_mlp_behind_it_and_behind_the_positions():
    encoder = shaken(ViT(tiny_config(depth=1, width=16, mlp=16, dropout=0.25)))
    [block] = silenced(encoder, "mixer.project", "mlp.contract").blocks
    tokens = torch.randn(500, 24, 16)
    whole = tokens + encoder.positions.patches((4, 6))
    found = encoder.patches(encoder.train().encode(tokens, layers=[0])[0])
    left_out = found == 0
    assert left_out.float().mean().item() == pytest.approx(0.25, abs=0.01)
    torch.testing.assert_close(found[~left_out], (whole / 0.75)[~left_out])
    with torch.no_grad():
        block.mlp.contract.weight.copy_(torch.eye(16))
    whole = block.eval()(tokens, Places((4, 6), 0)) - tokens
    change = block.train()(tokens, Places((4, 6), 0)) - tokens
    left_out = change == 0
    assert left_out.float().mean().item() == pytest.approx(1 - 0.75**2, abs=0.01), "once within, once behind"
    torch.testing.assert_close(change[~left_out], (whole / 0.75**2)[~left_out], rtol=1e-3, atol=1e-4)


def test_evaluation_drops_nothing(batch):
    plain, dropping = ViT(tiny_config()), ViT(tiny_config(dropout=0.3, drop_path=0.3))
    dropping.load_state_dict(shaken(plain).state_dict())
    assert not torch.allclose(dropping.train()(batch.images), plain(batch.images))
    assert torch.equal(dropping.eval()(batch.images), plain(batch.images))


@pytest.mark.parametrize(("settings", "draws"), [({}, False), ({"drop_path": 0.1}, True), ({"dropout": 0.1}, True)])
def test_without_regularisation_nothing_is_drawn(settings, draws, batch):
    encoder = ViT(tiny_config(**settings)).train()
    before = torch.get_rng_state()
    encoder(batch.images)
    assert torch.equal(torch.get_rng_state(), before) != draws


@pytest.mark.parametrize("name", ["dropout", "drop_path"])
@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_shares_to_drop_lie_below_one(name, value):
    with pytest.raises(ValueError, match=rf"model\.{name} must be in \[0, 1\), got {value}"):
        tiny_config(**{name: value})


@pytest.mark.parametrize("pool", POOLS)
def test_every_parameter_has_a_layer(pool):
    encoder = ViT(tiny_config(depth=3, pool=pool))
    whole = {"positions.table": 0, "stem.project.weight": 0, "stem.project.bias": 0, "norm.weight": 4, "norm.bias": 4}
    if pool == "cls":
        whole["class_token"] = 0
    found = {name: encoder.layer_of(name) for name, _ in encoder.named_parameters()}
    assert {name: layer for name, layer in found.items() if not name.startswith("blocks.")} == whole
    blocks = {name: layer for name, layer in found.items() if name.startswith("blocks.")}
    assert len(blocks) == 3 * 12
    assert all(layer == int(name.split(".")[1]) + 1 for name, layer in blocks.items())
