import math

import pytest
import torch
from conftest import tiny_config
from torch import nn

from mpp.loop import rate_at
from mpp.models.vit import ViT
from mpp.objectives.labels import Classification
from mpp.objectives.labels_config import LabelsConfig
from mpp.objectives.masked_patch import MaskedPatchPrediction
from mpp.optim import ema_decay, gradient_norm, learning_rate, parameter_groups
from mpp.train_config import TrainConfig


def test_only_weights_of_linear_layers_decay():
    objective = MaskedPatchPrediction(ViT(tiny_config()))
    decayed, other = parameter_groups(objective, 0.3)
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    found = sorted(names[id(parameter)] for parameter in decayed["params"])
    blocks = ["mixer.qkv", "mixer.project", "mlp.expand", "mlp.contract"]
    expected = [f"encoder.blocks.{block}.{part}.weight" for block in (0, 1) for part in blocks]
    assert found == sorted([*expected, "encoder.stem.project.weight", "head.weight"])
    assert (decayed["weight_decay"], other["weight_decay"]) == (0.3, 0.0)
    rest = {names[id(parameter)] for parameter in other["params"]}
    assert {"mask_token", "encoder.class_token", "encoder.positions.table", "encoder.norm.weight"} <= rest
    assert sorted([*found, *rest]) == sorted(names.values()), "each parameter is in one group"


def test_convolutions_decay_and_frozen_parameters_are_in_no_group():
    module = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 2), "teacher": nn.Linear(4, 4).requires_grad_(False)})
    decayed, other = parameter_groups(module, 0.1)
    assert [id(p) for p in decayed["params"]] == [id(module["conv"].weight)]
    assert [id(p) for p in other["params"]] == [id(module["conv"].bias)]


def test_the_learning_rate_is_linear_and_then_half_a_cosine():
    rates = [learning_rate(step, peak=2.0, steps=14, warmup=4) for step in range(15)]
    # Worked out by hand: quarters of the peak, then 1 + cos of multiples of 18 degrees.
    expected = [0.0, 0.5, 1.0, 1.5, 2.0, 1.951057, 1.809017, 1.587785, 1.309017, 1.0]
    expected += [0.690983, 0.412215, 0.190983, 0.048943, 0.0]
    assert rates == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_the_learning_rate_is_that_of_torchs_schedulers(warmup):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    linear = [step / warmup for step in range(warmup)]
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50 - warmup)
    for step in range(50):
        expected = 0.3 * linear[step] if step < warmup else optimizer.param_groups[0]["lr"]
        assert learning_rate(step, peak=0.3, steps=50, warmup=warmup) == pytest.approx(expected, rel=1e-6)
        if step >= warmup:
            optimizer.step()
            cosine.step()


def test_a_constant_phase_stays_at_the_peak_and_then_falls_as_one_minus_a_square_root():
    rates = [learning_rate(step, peak=2.0, steps=13, warmup=2, constant=9, end=1.0) for step in range(14)]
    # By hand: halves of the peak; from 9 on 1 + (1 - sqrt(share of the 4 last steps)).
    expected = [0.0, 1.0, *[2.0] * 8, 1.5, 2 - 0.5**0.5, 2 - 0.75**0.5, 1.0]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(
    ("steps", "warmup", "decay", "until"),
    [(10, 0, None, 8), (10, 2, 0.1, 9), (10, 0, 0.0, 10), (10, 0, 1.0, 0), (11, 0, 0.1, 9), (1000, 0, 0.1, 900),
     (10, 4, 0.7, 4), (1, 0, 0.2, 0)],
)  # fmt: skip
def test_the_decay_is_a_share_of_the_run_rounded_up(steps, warmup, decay, until):
    config = TrainConfig(steps=steps, warmup=warmup, schedule="wsd", decay=decay)
    assert config.constant_until == until
    assert TrainConfig(steps=steps, warmup=warmup).constant_until is None


def test_until_the_decay_the_rate_does_not_depend_on_the_length():
    short, long = (TrainConfig(steps=steps, warmup=3, schedule="wsd", lr=0.1) for steps in (20, 90))
    assert [rate_at(step, short) for step in range(1, 17)] == [rate_at(step, long) for step in range(1, 17)]
    assert rate_at(18, short) < rate_at(18, long) == 0.1


def test_the_running_average_forgets_the_initial_weights_at_first():
    assert [ema_decay(step, 0.99) for step in (0, 1, 8)] == pytest.approx([0.1, 2 / 11, 0.5])
    assert ema_decay(10_000, 0.99) == 0.99
    weight = math.prod(ema_decay(step, 0.9999) for step in range(1, 101))
    assert weight < 1e-11, "of the initial weights, after 100 steps"


@pytest.mark.parametrize("clip", [None, 0.01, 1.0, 1e6])
def test_gradients_are_clipped_as_torch_clips_them(clip):
    ours, theirs = ([nn.Parameter(torch.zeros(size)) for size in (3, 50, 7)] for _ in range(2))
    for first, second in zip(ours[:2], theirs[:2], strict=True):  # the third has no gradient
        first.grad = torch.randn_like(first)
        second.grad = first.grad.clone()
    expected = torch.nn.utils.clip_grad_norm_(theirs, math.inf if clip is None else clip)
    norm = gradient_norm(ours, clip)
    torch.testing.assert_close(norm, expected)
    for first, second in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(first.grad, second.grad)
    assert ours[2].grad is None


def mae_rate(epoch: float, lr: float, min_lr: float, epochs: int, warmup_epochs: int) -> float:
    """MAE's util/lr_sched.py, for a fractional epoch."""
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs)))


def test_the_schedule_is_maes_for_every_step():
    steps_per_epoch, epochs, warmup = 7, 20, 5
    for step in range(epochs * steps_per_epoch):
        rate = learning_rate(step, peak=1e-3, steps=140, warmup=35, end=1e-6)
        assert rate == pytest.approx(mae_rate(step / steps_per_epoch, 1e-3, 1e-6, epochs, warmup), rel=1e-12)


MAE_NAMES = {
    "class_token": "cls_token",
    "positions.table": "pos_embed",
    "stem.project.weight": "patch_embed.proj.weight",
    "stem.project.bias": "patch_embed.proj.bias",
    "norm.weight": "fc_norm.weight",
    "norm.bias": "fc_norm.bias",
}


def mae_layer(name: str, layers: int) -> int:
    """MAE's util/lr_decay.py, get_layer_id_for_vit."""
    if name in ["cls_token", "pos_embed"] or name.startswith("patch_embed"):
        return 0
    if name.startswith("blocks"):
        return int(name.split(".")[1]) + 1
    return layers


def test_layer_decay_and_weight_decay_are_maes_for_every_parameter():
    objective = Classification(ViT(tiny_config(depth=12)), LabelsConfig(classes=("a", "b")))
    groups = parameter_groups(objective, 0.05, 0.65, objective.encoder)
    found = {id(p): (group["scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(found) == len(list(objective.parameters()))
    assert groups[0]["scale"] == 1, "the log shows the first group's rate"
    layers = 12 + 1
    for name, parameter in objective.named_parameters():
        name = name.removeprefix("encoder.")
        name = MAE_NAMES.get(name, name)
        scale = 0.65 ** (layers - mae_layer(name, layers))
        one_dimensional = parameter.ndim == 1 or name in ("cls_token", "pos_embed")  # MAE's no_weight_decay_list
        assert found[id(parameter)] == (pytest.approx(scale, rel=1e-12), 0.0 if one_dimensional else 0.05), name


def test_without_layer_decay_all_get_the_whole_rate(tiny_vit):
    assert {group["scale"] for group in parameter_groups(tiny_vit, 0.1)} == {1.0}
