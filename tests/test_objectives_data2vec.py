"""data2vec for images: against its formulas, written out; its teacher; and runs that stop and go on."""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import shaken, tiny_config
from many_processes import close_weights, figures, left, start
from safetensors.torch import load_file
from tiny_runs import digests, run
from torch import Tensor

import mpp
from mpp import checkpoint, draws, targets
from mpp.batch import Batch
from mpp.counts import parameters
from mpp.data.subset import some_labelled
from mpp.log import picture_grid
from mpp.loop import build_optimizer
from mpp.models.cnn import ResNet
from mpp.models.layers import take
from mpp.models.resnet_config import ResNetConfig
from mpp.models.vit import ViT
from mpp.objectives.data2vec import Data2Vec
from mpp.objectives.data2vec_config import Data2VecConfig
from mpp.recipe import load_recipe
from mpp.run.start import at_start
from mpp.shards.index import read_index
from mpp.shards.write import make_shards
from mpp.train_config import TrainConfig

WORKER = Path(__file__).with_name("ranks_worker.py")
RECIPE = """\
seed: 5
model: {image: 8, patch: 2, width: 32, depth: 3, heads: 2, positions: sincos2d, pool: avg, drop_path: 0.2}
objective: {name: data2vec, top: 2, momentum: [0.8, 0.95]}
data: {path: DIGITS, val: test, threads: 1, augment: {crop: shift, pad: 1, flip: false}}
train: {steps: 6, warmup: 2, batch: 24, micro_batch: 6, lr: 3e-3, device: cpu, threads: 1, save_every: 3, keep: 9,
  precision: float32}
eval: {every: 3, images: 60, knn: 100}
log: {every: 1, pictures: 3, tensorboard: false}
"""


def build(encoder: ViT | None = None, **config) -> Data2Vec:
    torch.manual_seed(2)
    encoder = shaken(ViT(tiny_config(depth=3))) if encoder is None else encoder
    objective = Data2Vec(encoder, Data2VecConfig(**{"top": 2} | config))
    with torch.no_grad():
        for part in (*objective.teacher.parameters(), objective.mask_token, *objective.head.parameters()):
            part.add_(0.1 * torch.randn_like(part))  # so that it is no copy any more
    return objective


@pytest.fixture
def hidden() -> Tensor:
    with draws.drawing(draws.keys_of(0, 1, torch.arange(4).numpy())):
        return build().hiding.draw(4, torch.device("cpu"))


# The formulas, written out


def norm(tokens: Tensor, weight: Tensor | float = 1.0, bias: Tensor | float = 0.0, eps: float = 1e-5) -> Tensor:
    mean = tokens.mean(-1, keepdim=True)
    variance = (tokens - mean).square().mean(-1, keepdim=True)
    return (tokens - mean) / (variance + eps).sqrt() * weight + bias


def blocks_by_hand(weights: dict[str, Tensor], place: Tensor, images: Tensor, hidden=None, token=None) -> list[Tensor]:
    """The outputs (b, 1 + n, d) of all blocks of a ViT of 8-pixel patches with a class token and two heads."""
    pixels = (images.double() / 255 - 0.5) / 0.5
    patches = torch.stack(
        [
            pixels[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].permute(0, 2, 3, 1).flatten(1)
            for row in range(4)
            for column in range(6)
        ],
        dim=1,
    )
    tokens = patches @ weights["stem.project.weight"].T + weights["stem.project.bias"]
    if hidden is not None:
        rows = [
            torch.stack([token if n in hidden[b].tolist() else tokens[b, n] for n in range(24)])
            for b in range(len(images))
        ]
        tokens = torch.stack(rows)
    tokens = torch.cat([weights["class_token"].expand(len(images), 1, -1), tokens + place], dim=1)
    found = []
    for number in range(3):
        own = {n.removeprefix(f"blocks.{number}."): w for n, w in weights.items() if n.startswith(f"blocks.{number}.")}
        x = norm(tokens, own["norm1.weight"], own["norm1.bias"], 1e-6)
        q, k, v = (x @ own["mixer.qkv.weight"].T + own["mixer.qkv.bias"]).chunk(3, dim=-1)
        heads = []
        for head in (slice(0, 32), slice(32, 64)):
            scores = q[..., head] @ k[..., head].transpose(1, 2) / math.sqrt(32)
            heads.append(scores.softmax(-1) @ v[..., head])
        mixed = torch.cat(heads, dim=-1)
        tokens = tokens + mixed @ own["mixer.project.weight"].T + own["mixer.project.bias"]
        x = norm(tokens, own["norm2.weight"], own["norm2.bias"], 1e-6) @ own["mlp.expand.weight"].T
        x = x + own["mlp.expand.bias"]
        x = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
        tokens = tokens + x @ own["mlp.contract.weight"].T + own["mlp.contract.bias"]
        found.append(tokens)
    return found


@pytest.fixture(scope="module")
def reference() -> SimpleNamespace:
    """An objective in float64, and what the formulas give for it, with gradients."""
    torch.manual_seed(2)
    objective = build(ViT(tiny_config(depth=3, pool="cls", positions="sincos2d_mae"))).double()
    images = torch.randint(0, 256, (3, 3, 32, 48), dtype=torch.uint8)
    hidden = torch.stack([torch.randperm(24)[:14] for _ in range(3)])
    place = objective.encoder.positions.patches((4, 6)).double()
    teacher = {name: value.detach() for name, value in objective.teacher.named_parameters()}
    outputs = blocks_by_hand(teacher, place, images)[-2:]
    truth = norm(sum(norm(tokens[:, 1:]) for tokens in outputs) / 2)
    student = {name: value.detach().clone().requires_grad_() for name, value in objective.named_parameters()}
    own = {n.removeprefix("encoder."): w for n, w in student.items() if n.startswith("encoder.")}
    last = blocks_by_hand(own, place, images, hidden, student["mask_token"])[-1]
    last = norm(last, own["norm.weight"], own["norm.bias"], 1e-6)[:, 1:]
    said = last @ student["head.weight"].T + student["head.bias"]
    errors = torch.stack([(said[b, n] - truth[b, n]).abs() for b in range(3) for n in hidden[b].tolist()])
    assert 0.02 < (errors > 2).double().mean() < 0.98, "both branches of the loss count"
    loss = torch.where(errors < 2, errors.square() / 4, errors - 1).mean()
    loss.backward()
    return SimpleNamespace(
        objective=objective, images=images, hidden=hidden, truth=truth, said=said.detach(), loss=loss, student=student
    )


def test_targets_predictions_and_the_loss_are_those_of_the_formulas(reference):
    ours = reference.objective
    torch.testing.assert_close(ours.truth(reference.images), reference.truth, rtol=0, atol=1e-6)
    predicted = ours.predict(reference.images, reference.hidden)
    torch.testing.assert_close(predicted, take(reference.said, reference.hidden), rtol=0, atol=1e-6)
    loss, _ = ours.compute(reference.images, reference.hidden)
    assert loss.item() == pytest.approx(reference.loss.item(), rel=1e-7)


def test_every_gradient_is_that_of_the_formulas_and_the_teacher_has_none(reference):
    ours = reference.objective
    ours.zero_grad()
    ours.compute(reference.images, reference.hidden)[0].backward()
    for name, parameter in ours.named_parameters():
        if name.startswith("teacher."):
            assert parameter.grad is None
            assert not parameter.requires_grad
            continue
        expected = reference.student[name].grad
        scale = expected.abs().max().clamp(min=1e-6)  # no softmax feels keys' biases
        assert (parameter.grad - expected).abs().max() < 1e-5 * scale, name
        assert scale > 1e-6, name


def test_the_guess_without_learning_and_the_deviations_are_those_of_plain_loops(reference):
    with torch.no_grad():
        _, metrics = reference.objective.compute(reference.images, reference.hidden)
    truth = take(reference.truth, reference.hidden)
    errors = (truth - truth.mean((0, 1))).abs()
    guess = torch.where(errors < 2, errors.square() / 4, errors - 1).mean()
    assert metrics["mean"].item() == pytest.approx(guess.item(), rel=1e-6)
    for name, values in {"spread": reference.truth, "predicted": reference.said}.items():
        squares, degrees = 0.0, 0
        for place in range(24):
            rows = [values[b, place] for b in range(3) if place in reference.hidden[b].tolist()]
            if rows:
                mean = sum(rows) / len(rows)
                squares += sum((row - mean).square().mean().item() for row in rows)
                degrees += len(rows) - 1
        assert metrics[name].item() == pytest.approx(math.sqrt(squares / degrees), rel=1e-6)


def test_a_teacher_that_says_the_same_of_every_image_has_no_spread(batch, hidden):
    objective = build(ViT(tiny_config(depth=3, positions="learned")))
    assert objective.compute(batch.images, hidden)[1]["spread"] > 0.1
    with torch.no_grad():
        objective.teacher.stem.project.weight.zero_()
    assert objective.compute(batch.images, hidden)[1]["spread"] < 1e-3


# The teacher


@pytest.mark.parametrize(
    ("momentum", "rise", "expected"),
    [
        ((0.9998, 0.9998), 1.0, [0.9998] * 5),
        ((0.5, 0.9), 1.0, [0.5, 0.6, 0.7, 0.8, 0.9]),
        ((0.5, 0.9), 0.5, [0.5, 0.7, 0.9, 0.9, 0.9]),
    ],
)
def test_the_momentum_rises_in_a_line_and_stays(momentum, rise, expected):
    config = Data2VecConfig(momentum=momentum, rise=rise)
    assert [config.momentum_at(part / 4) for part in range(5)] == pytest.approx(expected)


def test_the_teacher_is_a_running_average_that_nothing_else_moves(batch):
    objective = build(ViT(tiny_config(depth=3, dropout=0.3, drop_path=0.5)), momentum=(0.5, 0.9)).train()
    config = TrainConfig(steps=4, batch=4, lr=0.05, weight_decay=0.5)
    optimizer = build_optimizer(objective, config)
    assert not objective.teacher.training
    assert objective.encoder.training
    taught = {id(part) for part in objective.teacher.parameters()}
    assert not taught & {id(part) for group in optimizer.param_groups for part in group["params"]}
    slow = [part.clone() for part in objective.teacher.parameters()]
    assert torch.equal(objective.truth(batch.images), objective.truth(batch.images)), "nothing is dropped in it"
    for step in range(1, 4):
        objective(batch)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        for mine, own in zip(slow, objective.teacher.parameters(), strict=True):
            assert torch.equal(mine, own)
        objective.after_step(step / 4)
        momentum = 0.5 + 0.4 * step / 4
        slow = [
            momentum * a + (1 - momentum) * b.detach()
            for a, b in zip(slow, objective.encoder.parameters(), strict=True)
        ]
        for mine, own in zip(slow, objective.teacher.parameters(), strict=True):
            torch.testing.assert_close(own, mine)
        slow = [part.clone() for part in objective.teacher.parameters()]
    names = [name for name, _ in objective.encoder.named_parameters()]
    assert names == [name for name, _ in objective.teacher.named_parameters()]


def test_the_teacher_computes_no_norm_no_pool_and_no_gradient(batch, monkeypatch):
    objective = build()

    def refuse(*given):
        raise AssertionError

    for part in (objective.teacher.norm, objective.teacher.pooling):
        part.register_forward_pre_hook(refuse)
    assert not objective.truth(batch.images).requires_grad


@pytest.mark.parametrize("pool", ["cls", "avg", "avg_norm", "cls_avg", "map"])
@pytest.mark.parametrize("mixer", ["attention", "conv"])
def test_it_learns_with_any_pool_and_mixer_what_a_teacher_at_rest_says(pool, mixer, batch, hidden):
    if mixer == "conv" and pool not in ("avg", "avg_norm"):
        pytest.skip("a class token needs attention")
    objective = build(
        ViT(tiny_config(pool=pool, mixer=(mixer,), registers=2 * (mixer == "attention"))), momentum=(1.0, 1.0)
    )
    optimizer, losses = torch.optim.Adam(objective.parameters(), lr=3e-3), []
    for _ in range(25):
        loss, metrics = objective.compute(batch.images, hidden)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert losses[-1] < metrics["mean"]


@pytest.mark.parametrize("stem", ["linear", "conv"])
def test_what_is_hidden_can_not_be_seen_by_the_student_and_is_by_the_teacher(stem, hidden):
    objective = build(ViT(tiny_config(stem=stem, positions="sincos2d")))
    images = torch.randn(4, 3, 32, 48, requires_grad=True)
    objective.predict(images, hidden).square().sum().backward()
    felt = targets.patch_pixels(images.grad, 8).abs().sum(2)  # (b, n)
    assert felt.gather(1, hidden).eq(0).all()
    assert felt.gt(0).sum() == 4 * (24 - objective.hiding.count)
    changed = images.detach().clone()
    changed[:, :, :8, :8] += 1
    assert not torch.allclose(objective.truth(changed), objective.truth(images.detach()))


def test_bfloat16_gives_nearly_the_same_loss_in_float32(batch, hidden):
    objective = build()
    exact, _ = objective.compute(batch.images, hidden)
    with torch.autocast("cpu", torch.bfloat16):
        loss, metrics = objective.compute(batch.images, hidden)
    assert {loss.dtype, *(value.dtype for value in metrics.values())} == {torch.float32}
    assert loss.item() == pytest.approx(exact.item(), rel=0.03)


def test_it_compiles_as_a_whole(batch, hidden):
    objective = build()
    compiled = torch.compile(objective.compute, backend="aot_eager", fullgraph=True)
    found, expected = compiled(batch.images, hidden), objective.compute(batch.images, hidden)
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-5)
    assert {name: value.item() for name, value in found[1].items()} == pytest.approx(
        {name: value.item() for name, value in expected[1].items()}, rel=1e-5
    )


# Pictures


@pytest.mark.parametrize("channels", [3, 1])
def test_pictures_are_the_principal_components_of_the_targets(channels):
    objective = build(shaken(ViT(tiny_config(channels=channels))), top=1)
    images = torch.randint(0, 256, (4, channels, 32, 48), dtype=torch.uint8)
    places = torch.arange(4).numpy()
    with draws.drawing(draws.keys_of(0, 1, places)):
        shown = objective.pictures(Batch(images))
    with draws.drawing(draws.keys_of(0, 1, places)):
        hidden = objective.hiding.draw(4, torch.device("cpu"))
    assert list(shown) == list(objective.config.pictures)
    assert {(row.dtype, tuple(row.shape[2:])) for row in shown.values()} == {(torch.uint8, (32, 48))}
    seen, whole = (targets.patch_pixels(pixels, 8) for pixels in (shown["seen"], images))
    for b in range(4):
        for n in range(24):
            assert torch.equal(seen[b, n], whole[b, n]) is (n not in hidden[b].tolist())
    rows = objective.truth(images).flatten(0, 1).double().numpy()
    centred = rows - rows.mean(0)
    _, sizes, directions = __import__("numpy").linalg.svd(centred, full_matrices=False)
    said = objective.predict(images, hidden).detach().double().numpy()
    truth, predicted = (targets.patch_pixels(shown[name], 8).unflatten(2, (64, 3)) for name in ("truth", "predicted"))
    for part in range(3):
        direction = directions[part] * (1 if directions[part][abs(directions[part]).argmax()] > 0 else -1)
        deviation = sizes[part] / math.sqrt(len(rows) - 1)
        for painted, values in ((truth[..., part], centred), (take(predicted[..., part], hidden), said - rows.mean(0))):
            expected = (127.5 + 127.5 * (values @ direction) / (2 * deviation)).clip(0, 255).reshape(-1)
            assert abs(painted.flatten(0, 1).double().numpy() - expected[:, None]).max() < 0.6
    outside = torch.ones(4, 24, dtype=torch.bool).scatter(1, hidden, False)
    assert torch.equal(predicted[outside], truth[outside])


# Runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """A recipe, its run by one process, and by two: both whole, and stopped after step 3 and gone on with."""
    folder = tmp_path_factory.mktemp("data2vec")
    make_shards("digits", folder / "digits", report=lambda line: None, progress=False)
    (folder / "recipes").mkdir()
    (folder / "recipes/run.yaml").write_text(RECIPE.replace("DIGITS", str(folder / "digits")))
    assert run("pretrain", folder / "recipes/run.yaml", f"out={folder / '1/run'}").code == 0
    for _ in range(2):
        ends = left(start(2, [str(WORKER), "recipes", "2"], folder))
        assert [end.status for end in ends] == [0, 0], ends[0].said
        if not (folder / "whole").exists():
            shutil.copytree(folder / "2", folder / "whole")
            shutil.rmtree(folder / "2/run/checkpoints/step-00000006")
            (folder / "2/run/encoder.safetensors").unlink()
    return folder


def test_a_run_that_stopped_and_went_on_is_bit_for_bit_one_that_did_not(folder):
    shutil.copytree(folder / "1/run", folder / "again")
    shutil.rmtree(folder / "again/checkpoints/step-00000006")
    (folder / "again/encoder.safetensors").unlink()
    recipe = folder / "recipes/run.yaml"
    assert run("pretrain", recipe, f"out={folder / 'again'}").code == 0
    for one, other in (("1/run", "again"), ("whole/run", "2/run")):
        assert digests(folder / one, 6) == digests(folder / other, 6)
        assert figures(folder / one) == figures(folder / other)
    model = load_file(folder / "1/run/checkpoints/step-00000006/model.safetensors")
    assert any(not torch.equal(model[f"teacher.{n}"], model[f"encoder.{n}"]) for n in ("norm.bias", "norm.weight"))


def test_two_processes_train_as_one(folder):
    here, there = figures(folder / "1/run"), figures(folder / "2/run")
    assert here.keys() == there.keys()
    for step, values in here.items():
        assert there[step] == pytest.approx(values, rel=2e-6, abs=2e-6), step
    close_weights(folder / "1/run/encoder.safetensors", folder / "2/run/encoder.safetensors", 1e-4)


def test_the_result_is_the_student_or_if_asked_the_teacher(folder, tmp_path):
    model = load_file(folder / "1/run/checkpoints/step-00000006/model.safetensors")
    student = mpp.load_encoder(folder / "1/run").state_dict()
    assert all(torch.equal(value, model[f"encoder.{name}"]) for name, value in student.items())
    assert run("pretrain", folder / "recipes/run.yaml", f"out={tmp_path / 'out'}", "objective.result=teacher").code == 0
    for place in ("", f"checkpoints/step-{checkpoint.steps(tmp_path / 'out/checkpoints')[-1]:08d}"):
        teacher = mpp.load_encoder(tmp_path / "out" / place).state_dict()
        assert all(torch.equal(value, model[f"teacher.{name}"]) for name, value in teacher.items())
    encoder, found = mpp.load_encoder(tmp_path / "out"), []
    for split, rows in (("train", some_labelled(read_index(folder / "digits", "train"), 100)), ("test", range(60))):
        [batch] = mpp.read_shards(folder / "digits", 100, split=split, train=False, numbers=[*rows])
        with torch.no_grad():
            found += [encoder.eval()(batch.images), batch.labels]
    known, labels, told, truth = found
    score = mpp.eval.knn_accuracy(known, labels, told, truth, k=20)
    assert figures(tmp_path / "out")[6]["val/knn"] == pytest.approx(score)
    assert figures(folder / "1/run")[6]["val/knn"] != pytest.approx(score), "that of the student"


def test_student_and_teacher_begin_with_the_weights_given(folder):
    given = mpp.load_encoder(folder / "1/run").state_dict()
    for weights in (None, str(folder / "1/run")):
        objective = at_start(load_recipe(folder / "recipes/run.yaml", [f"weights={weights or 'null'}"]))
        own, taught = objective.encoder.state_dict(), objective.teacher.state_dict()
        assert all(torch.equal(value, taught[name]) for name, value in own.items())
        assert (weights is not None) == all(torch.equal(value, given[name]) for name, value in own.items())


def test_a_plan_counts_no_teacher_among_what_is_trained(folder):
    recipe = load_recipe(folder / "recipes/run.yaml")
    trained, others = parameters(recipe), parameters(recipe, trained=False)
    objective = at_start(recipe)
    whole = sum(part.numel() for part in objective.encoder.parameters())
    assert [*others.items()] == [("teacher", whole)]
    assert sum(trained.values()) == whole + 32 + 32 * 33  # mask token and head
    assert "teacher" in run("plan", folder / "recipes/run.yaml").out.partition("not trained")[2]


# What does not go together


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top": 0}, "objective.top must be at least 1, got 0"),
        ({"beta": 0.0}, r"objective.beta must be in \[0.0001, 10000\], got 0"),
        ({"beta": math.nan}, r"objective.beta must be in \[0.0001, 10000\], got nan"),
        ({"momentum": (0.9, 1.1)}, r"objective.momentum must be two numbers in \[0, 1\], got \(0.9, 1.1\)"),
        ({"rise": 0.0}, r"objective.rise must be in \(0, 1\], got 0.0"),
        ({"share": 1.0}, r"objective.share must be in \(0, 1\), got 1.0"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Data2VecConfig(**changes)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("objective.top=4", "objective.top (4) must be at most model.depth (3)"),
        ("objective.share=0.99", "objective.mask blocks, objective.share 0.99: "),
        ("objective.momentum=[0.9]", "objective.momentum: expected [a number, a number], found [0.9]"),
        ("objective.result=ema", 'objective.result: expected one of student, teacher, found "ema"'),
    ],
)
def test_a_recipe_that_can_not_be_is_one_line(setting, message, folder, tmp_path):
    assert message in run("pretrain", folder / "recipes/run.yaml", f"out={tmp_path / 'out'}", setting).line


def test_an_encoder_without_patches_is_refused():
    with pytest.raises(ValueError, match=r"objective.name data2vec needs an encoder of patches"):
        Data2Vec(ResNet(ResNetConfig(image=(32, 32), depth=18, width=4, stem="small")))


def test_the_defaults_are_the_published_ones_of_vit_b():
    config = Data2VecConfig()
    assert (config.top, config.beta, config.momentum, config.mask) == (6, 2.0, (0.9998, 0.9998), "blocks")
    assert Data2Vec(ViT(mpp.ViTConfig(depth=12, width=48, heads=2)), Data2VecConfig(share=0.6123)).hiding.count == 120
    weight = build(ViT(tiny_config(depth=3)), top=1).head.weight  # shaken by 0.1
    assert weight.std() < 0.12
    fresh = Data2Vec(ViT(tiny_config(width=512, heads=2)), Data2VecConfig(top=1)).head
    assert fresh.weight.abs().max() <= 0.02
    assert fresh.weight.std().item() == pytest.approx(0.02 * 0.5396, rel=0.01)  # of a normal cut at one deviation
    assert not fresh.bias.any()


def test_the_public_names_are_these():
    assert (mpp.Data2Vec, mpp.Data2VecConfig) == (Data2Vec, Data2VecConfig)
    assert mpp.OBJECTIVES["data2vec"].config is Data2VecConfig


def test_a_single_image_has_no_deviation_from_others(batch):
    objective = build()
    assert {"spread", "predicted"} <= objective(batch)[1].keys()
    assert objective(Batch(batch.images[:1]))[1].keys() == {"mean"}


@pytest.mark.parametrize("width", [1, 2])
def test_pictures_of_narrow_encoders_have_three_colours(width, batch):
    objective = build(ViT(tiny_config(width=width, heads=1, positions="none")))
    assert picture_grid(objective.pictures(batch)).shape[-1] == 3
