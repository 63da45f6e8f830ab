"""Fine-tuning with a frozen encoder is a linear head on its features."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_runs import LABELS, RESNET, metrics, run, small_splits, write_recipe

from mpp.data.read import read_shards
from mpp.recipe import load_recipe
from mpp.run.start import at_start
from mpp.weights import load_classifier, load_encoder

FROZEN = ("objective.freeze=true", "train.clip=null", "data.augment={crop: none, flip: false}", "train.save_every=2")
# With all that an encoder in training would draw or change.
KINDS = {"vit": LABELS.replace("pool: avg", "pool: avg, dropout: 0.3, drop_path: 0.3"), "resnet": RESNET}


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return small_splits(tmp_path_factory.mktemp("splits"))


@pytest.fixture(scope="module", params=KINDS)
def frozen(request, splits, tmp_path_factory):
    """A recipe, the encoder it starts from, and the finished run with that frozen."""
    folder = tmp_path_factory.mktemp(request.param)
    recipe = write_recipe(folder, splits, KINDS[request.param])
    batch = ["train.micro_batch=8"] if request.param == "resnet" else []
    assert run("finetune", recipe, *batch, "seed=9", f"out={folder / 'start'}").code == 0
    arguments = ["finetune", recipe, *batch, *FROZEN, "--from", folder / "start"]
    assert run(*arguments, f"out={folder / 'run'}").code == 0
    return arguments, folder / "start", folder / "run"


def test_the_encoder_stays_bit_for_bit(frozen):
    _, start, out = frozen
    before, after = load_encoder(start).state_dict(), load_encoder(out).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before), "batch norm's statistics among them"
    trained = load_file(out / "checkpoints/step-00000006/optimizer.safetensors")
    assert {name.partition("/")[0] for name in trained} == {"head.linear.weight", "head.linear.bias"}


def test_it_is_a_linear_head_that_torch_trains_on_the_encoders_features(frozen, splits):
    _, start, out = frozen
    encoder, classifier = load_encoder(start).eval(), load_classifier(out)
    recipe = load_recipe(out / "recipe.yaml")
    weight = torch.zeros(classifier.head.linear.weight.shape, requires_grad=True)  # heads start at zero
    bias = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=1.0, weight_decay=0.0)
    images = read_shards(splits, 8, seed=recipe.seed, augment=recipe.data.augment)
    logged = metrics(out)
    for step in range(6):
        rate = 1e-2 * step / 2 if step < 2 else 1e-2 * 0.5 * (1 + math.cos(math.pi * (step - 2) / 4))
        batch = images.at(step)
        with torch.no_grad():
            features = encoder(batch.images)
        loss = F.cross_entropy(F.linear(features, weight, bias), batch.labels)
        assert loss.item() == pytest.approx(next(line["loss"] for line in logged if line["step"] == step + 1), rel=1e-5)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(classifier.head.linear.weight.detach(), weight.detach())
    torch.testing.assert_close(classifier.head.linear.bias.detach(), bias.detach())


def test_it_goes_on_after_a_stop_and_with_a_running_average(frozen, tmp_path):
    arguments, start, _ = frozen
    ema = [*arguments, "train.ema=0.5", f"out={tmp_path / 'ema'}"]
    assert run(*ema).code == 0
    before, after = load_encoder(start).state_dict(), load_encoder(tmp_path / "ema").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    weights = (tmp_path / "ema/classifier.safetensors").read_bytes()
    (tmp_path / "ema/checkpoints/step-00000006/state.json").unlink()
    assert run(*ema).code == 0
    assert (tmp_path / "ema/classifier.safetensors").read_bytes() == weights


def test_no_backward_pass_goes_through_the_encoder(splits, tmp_path):
    recipe = write_recipe(tmp_path, splits, LABELS)
    objective = at_start(load_recipe(recipe, ["objective={freeze: true, classes: [a, b]}"])).train()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        loss, _ = objective(read_shards(splits, 8).at(0))
    loss.backward()
    assert all(parameter.grad is None for parameter in objective.encoder.parameters())
    assert all(parameter.grad is not None for parameter in objective.head.parameters())
    assert sum(tensor.numel() for tensor in kept) < 8 * 32 * 4, "features and logits, no activations"
    flops = [
        float(next(line for line in run("plan", recipe, *more).out.splitlines() if "an image" in line).split()[3])
        for more in ([], ["objective.freeze=true"])
    ]
    assert flops[1] < 0.4 * flops[0]


def test_what_makes_no_sense_beside_it_is_refused_and_random_weights_are_said(splits, tmp_path, caplog):
    recipe = write_recipe(tmp_path, splits, LABELS)
    for change, key in {
        "train.layer_decay=0.7": "train.layer_decay",
        "train.activation_checkpointing=true": "train.activation_checkpointing",
    }.items():
        result = run("finetune", recipe, *FROZEN, change, f"out={tmp_path / 'run'}")
        assert result.code == 2
        assert f"{key} is of an encoder that is trained, and objective.freeze keeps it as it is" in result.line
    assert run("finetune", recipe, *FROZEN, f"out={tmp_path / 'run'}").code == 0
    assert "has random weights; give --from WEIGHTS" in caplog.text


def test_a_head_can_be_trained_first_and_then_all(frozen, tmp_path):
    arguments, _, out = frozen
    on = [argument for argument in arguments[:-2] if argument != "objective.freeze=true"]
    assert run(*on, "train.steps=9", f"out={tmp_path / 'on'}", "--continue", out).code == 0
    assert json.loads((tmp_path / "on/settled.json").read_text())["continued"]["step"] == 6
    before, after = load_encoder(out).state_dict(), load_encoder(tmp_path / "on").state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
