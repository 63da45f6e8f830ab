import math
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from conftest import shaken, tiny_config
from learning import idle, trained
from numpy_mae import sincos
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mpp
from mpp import targets
from mpp.batch import Batch
from mpp.models.cnn import ResNet
from mpp.models.decoder_config import DecoderConfig
from mpp.models.layers import take
from mpp.models.resnet_config import ResNetConfig
from mpp.models.vit import ViT
from mpp.objectives.hiding import Hiding
from mpp.objectives.mae import MAE, Draw
from mpp.objectives.mae_config import MAEConfig
from mpp.objectives.masked_patch import MaskedPatchPrediction
from mpp.objectives.painting import hatch

SMALL = DecoderConfig(width=32, depth=2, heads=2)


def build(encoder: ViT | None = None, **config) -> MAE:
    encoder = encoder or ViT(tiny_config(positions="sincos2d_mae"))
    return shaken(MAE(encoder, MAEConfig(**{"decoder": SMALL} | config)))


# Against the official model, as transformers has it


def pairs(ours: MAE) -> Iterator[tuple[str, Tensor, bool]]:
    """transformers' name of each of our parameters, or of the parts of one, and whether it is a stem's weight."""
    encoder, decoder = ours.encoder, ours.decoder
    assert encoder.class_token is not None
    yield "vit.embeddings.cls_token", encoder.class_token, False
    yield "vit.embeddings.patch_embeddings.projection.weight", encoder.stem.project.weight, True
    yield "vit.embeddings.patch_embeddings.projection.bias", encoder.stem.project.bias, False
    yield "decoder.mask_token", decoder.mask_token, False
    modules: dict[str, nn.Module] = {
        "vit.layernorm": encoder.norm,
        "decoder.decoder_norm": decoder.trunk.norm,
        "decoder.decoder_embed": decoder.narrow,
        "decoder.decoder_pred": decoder.head,
    }
    for layers, trunk in {"vit.layers": encoder, "decoder.decoder_layers": decoder.trunk}.items():
        for number, block in enumerate(trunk.blocks):
            parts = [block.norm1, block.norm2, block.mixer.project, block.mlp.expand, block.mlp.contract]
            names = ["layernorm_before", "layernorm_after", "attention.o_proj", "mlp.fc1", "mlp.fc2"]
            modules |= {f"{layers}.{number}.{name}": part for name, part in zip(names, parts, strict=True)}
            for kind, first in {"weight": block.mixer.qkv.weight, "bias": block.mixer.qkv.bias}.items():
                yield f"{layers}.{number}.attention.*_proj.{kind}", first, False
    for name, module in modules.items():
        yield from ((f"{name}.{kind}", part, False) for kind, part in module.named_parameters())


def as_theirs(name: str, value: Tensor, stem: bool) -> dict[str, Tensor]:
    """Our values under their names, of their shapes but for axes of 1."""
    if "*" in name:
        return {name.replace("*", letter): part for letter, part in zip("qkv", value.chunk(3), strict=True)}
    return {name: value.unflatten(1, (8, 8, 3)).permute(0, 3, 1, 2) if stem else value}


@pytest.fixture(scope="module", params=[True, False], ids=["normalised", "plain"])
def official(request) -> SimpleNamespace:
    """Ours and theirs with the same weights, and what theirs gives."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    encoder = ViT(tiny_config(image=(32, 32), positions="sincos2d_mae"))
    ours = build(encoder, normalised=request.param).double()
    encoder_shape = {"image_size": 32, "patch_size": 8, "hidden_size": 64, "num_hidden_layers": 2}
    decoder_shape = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2}
    config = transformers.ViTMAEConfig(
        **encoder_shape,
        **decoder_shape,
        num_attention_heads=2,
        intermediate_size=256,
        decoder_intermediate_size=128,
        layer_norm_eps=1e-6,
        norm_pix_loss=request.param,
        attn_implementation="sdpa",
    )
    theirs = transformers.ViTMAEForPreTraining(config).double()
    found = {}
    for pair in pairs(ours):
        found |= as_theirs(pair[0], pair[1].detach(), pair[2])
    state = theirs.state_dict()
    given = {name: value.reshape(state[name].shape) for name, value in found.items()}
    # The official code's tables, which some versions of transformers make zero again for the decoder.
    given["vit.embeddings.position_embeddings"] = torch.from_numpy(sincos(4, 64))
    given["decoder.decoder_pos_embed"] = torch.from_numpy(sincos(4, 32))
    theirs.load_state_dict(given)
    images, noise = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8), torch.rand(3, 16)
    result = theirs(pixel_values=(images.double() / 255 - 0.5) / 0.5, noise=noise)
    result.loss.backward()
    order = noise.argsort(1)
    draw = Draw(order[:, :4], order[:, 4:])
    return SimpleNamespace(ours=ours, theirs=theirs, result=result, images=images, draw=draw)


def test_predictions_and_the_loss_are_the_official_ones(official):
    with torch.no_grad():
        predicted = official.ours.predict(official.images, official.draw)
        loss, _ = official.ours.compute(official.images, official.draw)
    torch.testing.assert_close(predicted, take(official.result.logits, official.draw.dropped), rtol=1e-6, atol=1e-7)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(official.result.loss.item(), rel=1e-7)


def test_every_gradient_is_the_official_one(official):
    official.ours.compute(official.images, official.draw)[0].backward()
    theirs = {name: part.grad for name, part in official.theirs.named_parameters() if part.requires_grad}
    seen = set()
    for name, parameter, stem in pairs(official.ours):
        for part, gradient in as_theirs(name, parameter.grad, stem).items():
            expected = theirs[part].reshape(gradient.shape)
            scale = theirs[part.replace("k_proj.bias", "q_proj.bias")].abs().max()  # no softmax feels keys' biases
            assert scale > 0, part
            assert (gradient - expected).abs().max() < 1e-6 * scale, part
            seen.add(part)
    assert seen == theirs.keys()
    own = {id(parameter) for _, parameter, _ in pairs(official.ours)}
    assert all(id(parameter) in own for parameter in official.ours.parameters())


# The loss, the slow way round


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("pool", ["cls", "avg"])
def test_the_loss_is_the_mean_over_dropped_patches_alone(pool, normalised, batch):
    encoder = shaken(ViT(tiny_config(pool=pool, registers=2, positions="learned", mean=(0.4, 0.5, 0.6), std=(0.3,))))
    objective = build(encoder, share=0.6, normalised=normalised)
    draw = objective.draw(4, torch.device("cpu"))
    assert draw.kept.shape == (4, 9), "40 % of 24 patches, rounded down"
    predicted = objective.predict(batch.images, draw)
    losses, errors, flat = [], [], []
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor(0.3)
    for b in range(4):
        for k, patch in enumerate(draw.dropped[b].tolist()):
            row, column = divmod(patch, 6)
            pixels = batch.images[b, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] / 255  # (3, 8, 8)
            truth = ((pixels.permute(1, 2, 0) - mean) / std).flatten()
            centre, spread = truth.mean(), (truth.var(unbiased=True) + 1e-6).sqrt()
            target = (truth - centre) / spread if normalised else truth
            losses.append((predicted[b, k] - target).square().mean())
            painted = predicted[b, k] * spread + centre if normalised else predicted[b, k]
            errors.append(((painted - truth) * std).square().mean())
            flat.append(((centre - truth) * std).square().mean())
    loss, metrics = objective.compute(batch.images, draw)
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    assert metrics["psnr"].item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)
    assert metrics["flat"].item() == pytest.approx(torch.stack(flat).mean().item(), rel=1e-5)


@pytest.mark.parametrize("pool", ["cls", "avg", "avg_norm", "cls_avg", "map"])
def test_a_dropped_patch_can_not_be_seen_and_every_kept_one_is(pool):
    objective = build(ViT(tiny_config(pool=pool, positions="sincos2d_mae")))
    draw = objective.draw(1, torch.device("cpu"))
    images = torch.randn(1, 3, 32, 48, requires_grad=True)
    objective.predict(images, draw).square().sum().backward()
    felt = targets.patch_pixels(images.grad, 8).abs().sum((0, 2))  # (n,)
    assert felt[draw.dropped[0]].eq(0).all()
    assert felt[draw.kept[0]].gt(0).all()


@pytest.mark.parametrize("mixer", ["attention", "conv"])
@pytest.mark.parametrize("positions", ["learned", "sincos2d_mae", "rope"])
@pytest.mark.parametrize("pool", ["cls", "avg"])
def test_it_learns_with_any_decoder_and_nothing_in_it_is_idle(pool, positions, mixer, batch):
    mixers = ("attention",) if mixer == "attention" else ("conv", "attention")
    decoder = DecoderConfig(width=32, depth=2, heads=2, mixer=mixers, positions=positions)
    objective = MAE(ViT(tiny_config(pool=pool, positions="sincos2d")), MAEConfig(decoder=decoder, normalised=False))
    batch.images[:] = batch.images[:, :, :1, :1]  # each image of one colour, which every patch tells
    losses = trained(objective, lambda: objective(batch), 20)
    assert losses[-1] < 0.5 * losses[0]
    assert idle(objective) == []


def test_two_thousand_draws_drop_each_patch_as_often():
    draw = build().draw(2000, torch.device("cpu"))
    assert draw.kept.shape == (2000, 6)
    assert torch.equal(torch.cat(draw, dim=1).sort(1).values, torch.arange(24).expand(2000, -1))
    often = torch.bincount(draw.dropped.flatten(), minlength=24) / 2000
    assert often.tolist() == pytest.approx([0.75] * 24, abs=4.5 * math.sqrt(0.75 * 0.25 / 2000))


@pytest.mark.parametrize(
    ("share", "patches", "kept"),
    [(0.75, 196, 49), (0.75, 64, 16), (0.6, 196, 78), (0.9, 196, 19), (0.5, 49, 24), (0.9, 10, 1), (0.7, 10, 3)],
)
def test_the_share_is_the_official_one_but_for_what_floats_lack(share, patches, kept):
    assert patches - Hiding(MAEConfig(share=share), (1, patches)).count == kept
    assert kept - int(patches * (1 - share)) in (0, int((share, patches) == (0.9, 10)))  # 10 * (1 - 0.9) < 1 there


def test_the_first_weights_are_the_official_ones_of_the_decoder():
    decoder = MAE(ViT(tiny_config()), MAEConfig(decoder=DecoderConfig(width=512, depth=1))).decoder
    assert decoder.mask_token.std().item() == pytest.approx(0.02, rel=0.15)
    for linear in (decoder.narrow, decoder.head):
        bound = math.sqrt(6 / sum(linear.weight.shape))
        assert linear.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
        assert linear.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert not linear.bias.any()
    assert (MAEConfig().decoder.width, MAEConfig().decoder.depth, MAEConfig().decoder.heads) == (512, 8, 16)


# Pictures


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("channels", [3, 1])
def test_pictures_are_denormalised_in_dropped_patches_and_the_image_elsewhere(channels, normalised):
    objective = build(ViT(tiny_config(channels=channels, mean=(0.3,), std=(0.2,))), normalised=normalised)
    images = torch.randint(0, 256, (4, channels, 32, 48), dtype=torch.uint8)
    torch.manual_seed(3)
    shown = objective.pictures(Batch(images))
    torch.manual_seed(3)
    draw = objective.draw(4, torch.device("cpu"))
    assert list(shown) == list(objective.config.pictures)
    assert torch.equal(shown["truth"], images)
    whole = targets.patch_pixels(images, 8)
    for name in ("seen", "predicted"):
        assert shown[name].dtype == torch.uint8
        assert torch.equal(take(targets.patch_pixels(shown[name], 8), draw.kept), take(whole, draw.kept))
    chequered = take(hatch(images, 8), draw.dropped)
    assert torch.equal(take(targets.patch_pixels(shown["seen"], 8), draw.dropped), chequered)
    painted = objective.predict(images, draw)
    if normalised:  # what a patch is told is its own mean and deviation, over all its pixels and channels
        truth = (take(whole, draw.dropped) / 255 - 0.3) / 0.2
        painted = painted * (truth.var(-1, keepdim=True) + 1e-6).sqrt() + truth.mean(-1, keepdim=True)
    expected = (255 * (painted * 0.2 + 0.3)).clamp(0, 255)
    found = take(targets.patch_pixels(shown["predicted"], 8), draw.dropped)
    assert (found - expected).abs().max() < 0.51


def test_bfloat16_gives_nearly_the_same_loss_in_float32(batch):
    objective = build()
    draw = objective.draw(4, torch.device("cpu"))
    exact, _ = objective.compute(batch.images, draw)
    with torch.autocast("cpu", torch.bfloat16):
        loss, metrics = objective.compute(batch.images, draw)
    assert loss.dtype == metrics["psnr"].dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)


# What does not go together


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"share": 0.97}, r"^objective.mask random, objective.share 0.97: a mask of 24 patches leaves nothing visible"),
        (
            {"share": 1e-8},
            r"^objective.mask random, objective.share 1e-08: .* nothing to predict of a grid of 4 x 6",
        ),
        (
            {"mask": "large_units"},
            r"^objective.mask large_units, objective.share 0.75: units of 4 x 4 .* grid of 4 x 6",
        ),
        (
            {"decoder": DecoderConfig(width=32, heads=2, registers=2)},
            r"^objective.decoder.registers: the tokens in front",
        ),
        (
            {"decoder": DecoderConfig(width=32, heads=2, class_token=True)},
            r"^objective.decoder.class_token: the tokens",
        ),
    ],
)
def test_what_leaves_nothing_to_do_is_refused_before_anything_is_allocated(config, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        MAE(ViT(tiny_config()), MAEConfig(**config))


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, math.nan])
def test_an_impossible_share_is_refused(share):
    with pytest.raises(ValueError, match=r"objective.share must be in \(0, 1\)"):
        MAEConfig(share=share)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 5}, r"objective.decoder.width \(512\) must be a multiple of objective.decoder.heads \(5\)"),
        ({"mixer": ("cross",)}, "objective.decoder.mixer must be of attention, mlp, pool, conv, identity, got 'cross'"),
        ({"width": 30, "heads": 3}, "objective.decoder.positions sincos2d_mae needs a objective.decoder.width that 4"),
    ],
)
def test_an_impossible_decoder_is_refused_by_its_key(changes, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**changes)


def test_encoders_that_can_not_drop_patches_are_refused_by_setting():
    for changes, why in [
        ({"mixer": ("conv",), "pool": "avg"}, "model.mixer conv"),
        ({"stem": "conv"}, "model.stem conv"),
    ]:
        with pytest.raises(ValueError, match=f"objective.name mae drops patches, which this encoder can't: {why}"):
            MAE(ViT(tiny_config(**changes)))
    with pytest.raises(
        ValueError, match="objective.name mae drops patches, which this encoder can't: model.name resnet"
    ):
        MAE(ResNet(ResNetConfig(image=(32, 32), depth=18, width=4, stem="small")))


def test_it_costs_less_than_the_full_form(batch):
    encoder = ViT(tiny_config(depth=6))
    flops = {}
    for objective in (MAE(encoder, MAEConfig(decoder=SMALL)), MaskedPatchPrediction(encoder)):
        with FlopCounterMode(display=False) as counter:
            objective(batch)[0].backward()
        flops[type(objective)] = counter.get_total_flops()
    assert flops[MAE] < 0.5 * flops[MaskedPatchPrediction]


def test_the_public_names_are_these():
    assert (mpp.MAE, mpp.MAEConfig, mpp.DecoderConfig) == (MAE, MAEConfig, DecoderConfig)
    assert mpp.OBJECTIVES["mae"].config is MAEConfig
