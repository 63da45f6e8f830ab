"""Masked patch prediction whose masked patches are dropped: the encoder does not see them, a decoder predicts."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import shaken, tiny_config
from learning import idle, trained
from tiny_runs import Cut, PowerCut, digests, losses, run, small_splits, write_recipe
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mpp import draws, targets
from mpp.data.read import read_shards
from mpp.loop import train
from mpp.models.decoder_config import DecoderConfig
from mpp.models.layers import take
from mpp.models.vit import ViT
from mpp.objectives.mae import MAE
from mpp.objectives.mae_config import MAEConfig
from mpp.objectives.masked_patch import KEPT, MASKED, REPLACED, MaskedPatchPrediction
from mpp.objectives.masked_patch_config import MaskedPatchConfig
from mpp.train_config import LogConfig, TrainConfig

CPU = torch.device("cpu")
SMALL = DecoderConfig(width=32, depth=2, heads=2, positions="sincos2d")
ALL = (1.0, 0.0, 0.0)  # all corrupted patches are dropped


def build(encoder: ViT | None = None, **config) -> MaskedPatchPrediction:
    settings = MaskedPatchConfig(**{"share": 0.75, "split": ALL, "decoder": SMALL} | config)
    return shaken(MaskedPatchPrediction(encoder or ViT(tiny_config()), settings))


def gradients(objective: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    return {name: part.grad for name, part in objective.named_parameters()}


@pytest.mark.parametrize("target", ["normalised_pixels", "pixels"])
@pytest.mark.parametrize("pool", ["cls", "avg"])
def test_with_pixels_and_all_dropped_it_is_masked_autoencoding(pool, target, batch):
    mae = MAE(ViT(tiny_config(pool=pool)), MAEConfig(decoder=SMALL, normalised=target == "normalised_pixels"))
    mae = shaken(mae)
    ours = build(ViT(tiny_config(pool=pool)), target=target)
    ours.load_state_dict(mae.state_dict())
    found = []
    for objective in (mae, ours):
        with draws.drawing(draws.keys_of(1, 2, np.arange(4))):
            loss, metrics = objective(batch)
        found.append((loss, metrics, gradients(objective, loss)))
    (expected, figures, slopes), (loss, metrics, own) = found
    assert loss.item() == expected.item()
    assert {name: metrics[name] for name in figures} == figures
    assert own.keys() == slopes.keys()
    assert all(torch.equal(own[name], slopes[name]) for name in own)


@pytest.mark.parametrize("pool", ["cls", "avg"])
@pytest.mark.parametrize("target", ["mean_colour", "normalised_pixels"])
def test_the_loss_is_that_of_every_corrupted_patch_decoded_one_image_at_a_time(target, pool, batch):
    objective = build(ViT(tiny_config(pool=pool)), share=0.5, split=(0.5, 0.25, 0.25), target=target)
    draw = objective.draw(4, CPU)
    encoder, decoder, each = objective.encoder, objective.decoder, []
    tokens = encoder.embed(batch.images)
    for b in range(4):
        fates = dict(zip(draw.patches[b].tolist(), draw.fate[b].tolist(), strict=True))
        sources = dict(zip(draw.patches[b].tolist(), draw.other[b].tolist(), strict=True))
        shown = [patch for patch in range(24) if fates.get(patch) != MASKED]  # in row order
        assert sorted(draw.seen[b].tolist()) == shown
        given = tokens[b].clone()
        for patch in shown:
            if fates.get(patch) == REPLACED:
                given[patch] = tokens[b, sources[patch]]
        seen = decoder.narrow(encoder.encode(given[None], torch.tensor([shown])))
        whole = decoder.mask_token.repeat(24, 1)
        whole[shown] = seen[0, encoder.prefix :]
        front = seen[:, : encoder.prefix] if encoder.prefix else None
        outputs = decoder.head(decoder.trunk.encode(whole[None], front=front))[0, encoder.prefix :]
        for patch in fates:
            if target == "mean_colour":
                right = targets.mean_colour(batch.images, 8)[b, patch]
                each.append(F.cross_entropy(outputs[patch], right))
            else:
                pixels = targets.patch_pixels(batch.images / 127.5 - 1, 8)[b, patch]
                pixels = (pixels - pixels.mean()) / (pixels.var(unbiased=True) + 1e-6).sqrt()
                each.append((outputs[patch] - pixels).square().mean())
    assert len(each) == 4 * 12
    assert objective.compute(batch.images, draw)[0].item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-5)


def test_a_dropped_patch_can_not_be_seen_and_every_other_one_is():
    objective = build(split=(0.8, 0.0, 0.2))
    draw = objective.draw(1, CPU)
    images = torch.randn(1, 3, 32, 48, requires_grad=True)
    objective.predict(images, draw).square().sum().backward()
    felt = targets.patch_pixels(images.grad, 8).abs().sum((0, 2))  # (n,)
    assert felt[draw.patches[draw.fate == MASKED]].eq(0).all()
    assert felt[draw.seen[0]].gt(0).all()
    assert draw.seen.shape == (1, 24 - 14)


@pytest.mark.parametrize("mask", ["random", "blocks", "units", "inverse_block"])
def test_fates_have_fixed_counts_and_fall_on_each_hidden_patch_as_often(mask):
    objective = build(share=0.5, split=(0.6, 0.2, 0.2), mask=mask)
    draw = objective.draw(4000, CPU)
    assert draw.patches.shape == (4000, 12)
    for fate, count in [(MASKED, 7), (REPLACED, 3), (KEPT, 2)]:  # 7.2, 9.6 - 7, the rest
        assert ((draw.fate == fate).sum(1) == count).all()
    dropped = draw.patches[draw.fate == MASKED].reshape(4000, 7)
    both = torch.cat([dropped, draw.seen], 1).sort(1).values
    assert torch.equal(both, torch.arange(24).expand(4000, -1)), "each patch is either dropped or seen"
    hidden, lost = (torch.bincount(patches.flatten(), minlength=24) for patches in (draw.patches, dropped))
    for patch in range(24):
        spread = math.sqrt(7 / 12 * 5 / 12 / hidden[patch])
        assert lost[patch] / hidden[patch] == pytest.approx(7 / 12, abs=4.5 * spread)
    assert (draw.other != draw.patches)[draw.fate == REPLACED].all()


def test_the_first_guess_is_uniform_and_nothing_is_idle_afterwards(batch):
    encoder = ViT(tiny_config(pool="avg"))
    objective = MaskedPatchPrediction(encoder, MaskedPatchConfig(split=(0.8, 0.1, 0.1), decoder=SMALL))
    batch.images[:] = batch.images[:, :, :1, :1]  # each image of one colour, which every patch tells
    found = trained(objective, lambda: objective(batch), 20)
    assert found[0] == pytest.approx(math.log(512), rel=1e-5)
    assert found[-1] < 0.5 * found[0]
    assert idle(objective) == []


def test_it_costs_less_than_the_full_form(batch):
    encoder, flops = ViT(tiny_config(depth=6)), []
    for decoder, split in [(None, ALL), (DecoderConfig(width=32, depth=1, heads=2), ALL)]:
        objective = MaskedPatchPrediction(encoder, MaskedPatchConfig(share=0.75, split=split, decoder=decoder))
        with FlopCounterMode(display=False) as counter:
            objective(batch)[0].backward()
        flops.append(counter.get_total_flops())
    assert flops[1] < 0.5 * flops[0]


def test_pictures_show_what_is_dropped_and_replaced(batch):
    objective = build(split=(0.5, 0.5, 0.0), target=("mean_colour", "normalised_pixels"))
    torch.manual_seed(3)
    shown = objective.pictures(batch)
    torch.manual_seed(3)
    draw = objective.draw(4, CPU)
    assert list(shown) == list(objective.config.pictures)
    assert "dropped" in objective.config.pictures["corrupted"]
    for name, caption in objective.config.pictures.items():
        assert ("true mean and contrast" in caption) == (name == "normalised_pixels_predicted")
    whole, given = (targets.patch_pixels(shown[name], 8) for name in ("input", "corrupted"))
    rows = torch.arange(4)[:, None]
    dropped, replaced = draw.patches[:, :9], draw.patches[:, 9:]
    assert {*given[rows, dropped].flatten().tolist()} == {96, 160}
    assert torch.equal(given[rows, replaced], whole[rows, draw.other[:, 9:]])
    assert torch.equal(shown["normalised_pixels_truth"], batch.images)
    assert torch.equal(targets.mean_colour(shown["truth"], 8), targets.mean_colour(batch.images, 8))
    assert not torch.equal(take(targets.patch_pixels(shown["predicted"], 8), draw.patches), take(whole, draw.patches))


@pytest.mark.parametrize(
    ("config", "encoder", "message"),
    [
        ({"share": 1.0}, {}, r"objective.share 1 of 24 patches and objective.split \[1.0, .* leave nothing visible$"),
        ({"split": (0.0, 0.5, 0.5)}, {}, r"objective.split \[0.0, 0.5, 0.5\] leave nothing dropped"),
        ({"mask": "units", "share": 0.99}, {}, r"objective.mask units, objective.share 0.99: .* nothing visible"),
        ({}, {"stem": "conv"}, "objective.name mpp drops patches, which this encoder can't: model.stem conv"),
        ({}, {"mixer": ("conv",), "pool": "avg"}, "drops patches, which this encoder can't: model.mixer conv"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_before_anything_is_allocated(config, encoder, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        build(ViT(tiny_config(**encoder)), **config)


def test_all_may_be_corrupted_where_some_are_seen(batch):
    objective = build(share=1.0, split=(0.75, 0.25, 0.0))
    draw = objective.draw(4, CPU)
    assert (draw.patches.shape, draw.seen.shape) == ((4, 24), (4, 6))
    assert objective(batch)[0].isfinite()


def test_six_steps_equal_three_and_three_bit_for_bit(small_shards, tmp_path):
    images = read_shards(small_shards, 20, seed=5)
    config = TrainConfig(steps=6, batch=20, micro_batch=10, lr=1e-3, precision="float32", device="cpu", save_every=3)

    def fit(out, batches) -> None:
        torch.manual_seed(7)
        encoder = ViT(tiny_config(image=(16, 16), patch=4, width=32, depth=1))
        objective = MaskedPatchPrediction(encoder, MaskedPatchConfig(decoder=SMALL, mask="blocks"))
        log = LogConfig(every=1, pictures=0, tensorboard=False)
        train(objective, batches, config, out=out, log=log)

    fit(tmp_path / "whole", images)
    with pytest.raises(PowerCut):
        fit(tmp_path / "halves", Cut(images, after=5))
    fit(tmp_path / "halves", images)
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    assert digests(tmp_path / "halves", 6) == digests(tmp_path / "whole", 6)


def test_a_run_may_go_on_with_other_masks_but_not_with_another_decoder(tmp_path):
    path = write_recipe(tmp_path, small_splits(tmp_path))
    with_decoder = "objective.decoder={width: 32, depth: 1, heads: 2}"
    short = [path, with_decoder, "train.schedule=wsd", "train.decay=0.25", "log.tensorboard=false"]
    assert run("pretrain", *short, "train.steps=4", f"out={tmp_path / 'short'}").code == 0
    more = ["train.steps=6", f"out={tmp_path / 'on'}", "--continue", tmp_path / "short"]
    for change, found in [("decoder.depth=2", "objective.decoder.depth: 1 there, 2 here"), ("decoder=null", "decoder")]:
        refused = run("pretrain", *short, f"objective.{change}", *more)
        assert refused.code == 2
        assert found in refused.line
    other = [
        "objective.share=0.6",
        "objective.split=[1, 0, 0]",
        "objective.mask=blocks",
        "objective.decoder.dropout=0.1",
    ]
    went = run("pretrain", *short, *other, *more)
    assert went.code == 0, went.err
