import json
import math
import os
import weakref
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from conftest import shaken, tiny_config
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import FEW, Brightness, Cut, PowerCut, digests, fit, losses, masked, metrics
from torch import Tensor, nn
from torch.func import functional_call

from mpp import checkpoint
from mpp.batch import Batch
from mpp.checkpoint import CheckpointError
from mpp.data.read import read_shards
from mpp.execution import WORKSPACE, _largest_that_fits, choose, forward_pass
from mpp.hardware import multiplies_bfloat16
from mpp.jsons import read_lines
from mpp.loop import build_optimizer, train, update
from mpp.models.cnn import ResNet
from mpp.models.decoder_config import DecoderConfig
from mpp.models.resnet_config import ResNetConfig
from mpp.models.vit import ViT
from mpp.objectives import Needs
from mpp.objectives.labels import Classification
from mpp.objectives.labels_config import LabelsConfig
from mpp.objectives.mae import MAE
from mpp.objectives.mae_config import MAEConfig
from mpp.objectives.masked_patch import MaskedPatchPrediction
from mpp.objectives.masked_patch_config import MaskedPatchConfig
from mpp.optim import Scale
from mpp.train_config import Execution, LogConfig, TrainConfig
from mpp.watch import TrainingError

CPU = torch.device("cpu")
NO_BFLOAT16 = pytest.mark.skipif(not multiplies_bfloat16(CPU), reason="this CPU does not multiply bfloat16")
NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU")
PRECISIONS = ["float32", pytest.param("bfloat16", marks=NO_BFLOAT16)]


class Gradients(torch.optim.SGD):
    """Keeps the gradients of its last step, and changes nothing."""

    def step(self) -> None:
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"] if p.grad is not None]


def gradients_of(objective) -> Gradients:
    return Gradients([{"params": list(objective.parameters()), "scale": 1.0, "decay": 0.0, "factors": Scale()}])


def one_step(objective, optimizer, batch, config, seed=0, step=1):
    return update(objective, objective, optimizer, batch, config, config.micro_batch, seed, step)


def forward_of(objective, config):
    return forward_pass(objective, config, choose(objective, None, config))


@pytest.fixture
def images(small_shards):
    return read_shards(small_shards, 20, seed=5)


# Accumulation and randomness


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4, 6, 12])
def test_micro_batches_give_the_loss_and_gradients_of_the_whole_batch(micro_batch, tiny_vit):
    objective = Brightness(tiny_vit)
    batch = Batch(torch.randint(0, 256, (12, 3, 32, 48), dtype=torch.uint8))
    expected, expected_metrics = objective(batch)
    expected.backward()
    gradients = [p.grad.clone() for p in objective.parameters()]
    objective.zero_grad()
    optimizer = gradients_of(objective)
    config = replace(FEW, batch=12, micro_batch=micro_batch, clip=None)
    loss, norm, found = one_step(objective, optimizer, batch, config, seed=0, step=1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert found["red"].item() == pytest.approx(expected_metrics["red"].item(), rel=1e-5)
    assert norm.item() == pytest.approx(math.sqrt(sum((g**2).sum().item() for g in gradients)), rel=1e-4)
    for ours, theirs in zip(optimizer.seen, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in objective.parameters()), "nothing is left for the next step"


def test_a_smaller_last_micro_batch_counts_by_its_images(tiny_vit):
    objective = Brightness(tiny_vit)
    batch = Batch(torch.randint(0, 256, (7, 3, 32, 48), dtype=torch.uint8))
    expected = objective(batch)[0].item()
    config = replace(FEW, batch=12, micro_batch=3)
    loss, _, _ = one_step(objective, gradients_of(objective), batch, config, seed=0, step=1)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_draw_depends_on_seed_step_and_place_alone(tiny_vit):
    objective = Brightness(tiny_vit)

    def drawn(seed: int, step: int, micro_batch: int, images: int = 6) -> list[float]:
        torch.rand(torch.randint(1, 99, ()).item())  # whatever happened before
        objective.drawn.clear()
        batch = Batch(torch.randint(0, 256, (images, 3, 32, 48), dtype=torch.uint8))
        config = replace(FEW, batch=6, micro_batch=micro_batch)
        one_step(objective, gradients_of(objective), batch, config, seed, step)
        return list(objective.drawn)

    first = drawn(1, 4, 2)
    assert drawn(1, 4, 2) == first, "whatever the images"
    assert drawn(1, 4, 3) == first[:2], "place, not image, decides"
    draws = [value for seed in (1, 2) for step in (3, 4, 5) for value in drawn(seed, step, 2)]
    assert len(draws) == len(set(draws)) == 18


@pytest.mark.parametrize("name", ["masked", "dropped", "labels"])
def test_what_is_drawn_does_not_depend_on_the_micro_batch(name):
    """Masks, dropout, dropped paths, and mixtures of images, whose partners are in the same micro-batch."""
    encoder = shaken(ViT(tiny_config(depth=3, dropout=0.1, drop_path=0.3, pool="map")))
    config = LabelsConfig(classes=("a", "b", "c"), mixup=0.8, cutmix=1.0, smoothing=0.1)
    dropped = MaskedPatchConfig(decoder=DecoderConfig(width=32, depth=2, heads=2, drop_path=0.3), mask="blocks")
    objective = shaken(
        Classification(encoder, config)
        if name == "labels"
        else MaskedPatchPrediction(encoder, dropped if name == "dropped" else None)
    )
    images = torch.randint(0, 256, (12, 3, 32, 48), dtype=torch.uint8)
    batch, found = Batch(images, torch.arange(12) % 3), []
    for micro_batch in (12, 6, 4, 2):
        optimizer = gradients_of(objective)
        settings = replace(FEW, batch=12, micro_batch=micro_batch, clip=None)
        loss, _, _ = one_step(objective, optimizer, batch, settings, seed=0, step=1)
        found.append([loss, *optimizer.seen])
    for other in found[1:]:
        for ours, whole in zip(other, found[0], strict=True):
            torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-6)
    optimizer = gradients_of(objective)
    loss, _, _ = one_step(objective, optimizer, batch, replace(FEW, batch=12, micro_batch=12, clip=None), 0, step=2)
    assert (loss - found[0][0]).abs() > 1e-4, "another step draws otherwise"


@pytest.mark.parametrize(
    ("asked", "batch", "expected"), [("auto", 36, 36), ("auto", 2 * 8191, 2), (6, 36, 6), (9, 9, 9)]
)
def test_images_that_are_mixed_are_split_in_pairs(asked, batch, expected, images):
    objective = Classification(ViT(tiny_config(image=(64, 64))), LabelsConfig(classes=("a", "b"), mixup=0.5))
    assert choose(objective, images, replace(FEW, batch=batch, micro_batch=asked)).micro_batch == expected
    with pytest.raises(
        ValueError, match=r"train.micro_batch \(9\) must be even or train.batch \(36\): labels mixes each"
    ):
        choose(objective, images, replace(FEW, batch=36, micro_batch=9))


def test_a_constant_phase_gives_the_same_losses_whatever_the_length_and_its_last_checkpoint_is_kept(images, tmp_path):
    config = replace(FEW, schedule="wsd", decay=0.25, save_every=3, keep=1, ema=0.9)
    fit(tmp_path / "short", images, replace(config, steps=8))
    fit(tmp_path / "long", images, replace(config, steps=16, save_every=2))
    short, long = losses(tmp_path / "short"), losses(tmp_path / "long")
    assert [short[step] for step in range(1, 9)] == [long[step] for step in range(1, 9)]
    assert [line["lr"] for line in metrics(tmp_path / "short")] == pytest.approx(
        [0, 5e-4, *[1e-3] * 5, 1e-3 * (1 - math.sqrt(1 / 2))]
    )
    assert checkpoint.steps(tmp_path / "short/checkpoints") == [6, 8], "6 is before the decay, though keep is 1"
    assert checkpoint.steps(tmp_path / "long/checkpoints") == [12, 16]


@pytest.mark.parametrize("low", [0.0, 0.004])
def test_the_learning_rate_of_a_step_is_that_of_the_schedule(low, images, tmp_path):
    fit(tmp_path, images, replace(FEW, lr=0.02, min_lr=low))
    rates = [line["lr"] for line in metrics(tmp_path)]
    cosine = [low + (0.02 - low) * 0.5 * (1 + math.cos(math.pi * part / 4)) for part in range(4)]
    assert rates == pytest.approx([0, 0.01, *cosine])


def test_the_rate_ends_at_its_lowest(tiny_vit, batch):
    objective = Brightness(tiny_vit)
    config = replace(FEW, batch=4, micro_batch=4, steps=1001, warmup=1, lr=1e-2, min_lr=3e-3)
    optimizer = gradients_of(objective)
    one_step(objective, optimizer, batch, config, seed=0, step=1001)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(3e-3, rel=1e-4)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_sgd_is_momentum_with_weight_decay_in_the_gradient(decay, tiny_vit, batch):
    objective = Brightness(tiny_vit)
    config = replace(FEW, steps=3, warmup=0, lr=0.5, clip=None, optimizer="sgd", betas=(0.8, 0.999), weight_decay=decay)
    config = replace(config, batch=4, micro_batch=4)
    plain = {name: value.detach().clone() for name, value in objective.named_parameters()}
    speed = {name: torch.zeros_like(value) for name, value in plain.items()}
    kernels = {f"{name}.weight" for name, part in objective.named_modules() if isinstance(part, nn.Linear)}
    optimizer = build_optimizer(objective, config)
    for step in range(3):
        for value in plain.values():
            value.requires_grad_().grad = None
        functional_call(objective, plain, (batch,))[0].backward()
        for name, value in plain.items():
            gradient = value.grad + decay * value.detach() * (name in kernels)
            speed[name] = 0.8 * speed[name] + gradient
            plain[name] = value.detach() - 0.5 * 0.5 * (1 + math.cos(math.pi * step / 3)) * speed[name]
        one_step(objective, optimizer, batch, config, seed=0, step=step + 1)
    for name, value in objective.named_parameters():
        torch.testing.assert_close(value.detach(), plain[name], rtol=1e-4, atol=1e-5)


# Restart


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_six_steps_equal_three_and_three_bit_for_bit(precision, optimizer, ema, images, tmp_path):
    config = replace(FEW, precision=precision, optimizer=optimizer, ema=ema, weight_decay=0.1)
    whole = fit(tmp_path / "whole", images, config)
    with pytest.raises(PowerCut):
        fit(tmp_path / "halves", Cut(images, after=5), config)  # saved after step 3, in the middle of the second epoch
    assert sorted(losses(tmp_path / "halves")) == [1, 2, 3, 4, 5]
    halves = fit(tmp_path / "halves", images, config)
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    assert digests(tmp_path / "halves", 6) == digests(tmp_path / "whole", 6)
    assert set(digests(tmp_path / "whole", 6)) >= {"model.safetensors", "optimizer.safetensors"}
    assert ("ema.safetensors" in digests(tmp_path / "whole", 6)) == bool(ema)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, halves.state_dict()[name]), name
    norms = [[line["norm"] for line in metrics(tmp_path / name)] for name in ("whole", "halves")]
    assert norms[0] == norms[1]


def test_a_run_depends_on_its_seed(images, tmp_path):
    fit(tmp_path / "a", images, seed=1)
    fit(tmp_path / "b", images, seed=2)
    assert digests(tmp_path / "a", 6) != digests(tmp_path / "b", 6)


def test_a_finished_run_started_again_changes_nothing(images, tmp_path):
    first = fit(tmp_path, images, replace(FEW, ema=0.9))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    again = fit(tmp_path, images, replace(FEW, ema=0.9))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_the_running_average_is_the_result_and_is_one(images, tmp_path):
    config = replace(FEW, ema=0.5, save_every=1)
    final = fit(tmp_path, images, config)

    def saved(step: int, name: str) -> dict[str, Tensor]:
        return load_file(tmp_path / f"checkpoints/step-{step:08d}/{name}.safetensors")

    average = saved(1, "ema")
    for step in range(2, 7):
        decay, weights = min(0.5, (1 + step) / (10 + step)), saved(step, "model")
        average = {name: decay * value + (1 - decay) * weights[name] for name, value in average.items()}
    for name, value in final.named_parameters():
        torch.testing.assert_close(value.detach(), average[name])
        assert torch.equal(value, saved(6, "ema")[name])
    assert not torch.equal(final.head.weight, saved(6, "model")["head.weight"])


def labelled(norm: str = "batch") -> Classification:
    torch.manual_seed(7)
    encoder = ResNet(ResNetConfig(image=(16, 16), depth=18, width=4, stem="small", norm=norm))
    return Classification(encoder, LabelsConfig(classes=("a", "b")))


def test_the_running_average_is_also_one_of_batch_norms_statistics(images, tmp_path):
    objective, config = labelled(), replace(FEW, micro_batch=20, ema=0.5, save_every=1)
    train(objective, images, config, out=tmp_path, log=LogConfig(pictures=0, tensorboard=False))

    def saved(step: int, name: str) -> dict[str, Tensor]:
        return load_file(tmp_path / f"checkpoints/step-{step:08d}/{name}.safetensors")

    statistics = [name for name in objective.state_dict() if name.endswith(("running_mean", "running_var"))]
    assert len(statistics) == 2 * 20
    for name in [*statistics, "encoder.conv1.weight"]:
        average = saved(1, "ema")[name]
        for step in range(2, 7):
            decay = min(0.5, (1 + step) / (10 + step))
            average = decay * average + (1 - decay) * saved(step, "model")[name]
        torch.testing.assert_close(objective.state_dict()[name], average)
        assert not torch.equal(average, saved(6, "model")[name]), name


# Precision


@NO_BFLOAT16
def test_bfloat16_gives_nearly_the_loss_and_gradients_of_float32(tiny_vit, batch):
    objective = MaskedPatchPrediction(tiny_vit)
    nn.init.normal_(objective.head.weight, std=0.1)
    found = {}
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        loss, _ = forward_of(objective, replace(FEW, precision=precision, compile=False))(batch)
        assert loss.dtype == torch.float32
        loss.backward()
        assert all(p.grad.dtype == torch.float32 for p in objective.parameters())
        found[precision] = (loss.item(), torch.cat([p.grad.flatten() for p in objective.parameters()]))
        objective.zero_grad()
    assert found["bfloat16"][0] == pytest.approx(found["float32"][0], rel=0.03)
    assert found["bfloat16"][0] != found["float32"][0]
    assert F.cosine_similarity(found["bfloat16"][1], found["float32"][1], dim=0) > 0.99


@pytest.mark.parametrize("precision", PRECISIONS)
def test_activation_checkpointing_changes_memory_and_nothing_else(precision, batch):
    # Fused attention for the blocks, randomness in them, and an output asked for at some places alone.
    objective = shaken(MaskedPatchPrediction(ViT(tiny_config(depth=4, dropout=0.1, drop_path=0.2))))
    found, kept = {}, {}
    for checkpointing in (False, True):
        config = replace(FEW, precision=precision, activation_checkpointing=checkpointing, compile=False)
        sizes: dict[int, int] = {}

        def keep(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss, _ = forward_of(objective, config)(batch)
        loss.backward()
        kept[checkpointing] = sum(sizes.values())
        found[checkpointing] = [loss.detach(), *(parameter.grad for parameter in objective.parameters())]
        objective.zero_grad()
    assert all(torch.equal(*pair) for pair in zip(found[False], found[True], strict=True))
    assert kept[True] < 0.5 * kept[False]


@NO_BFLOAT16
def test_all_that_is_kept_is_float32_after_training_in_bfloat16(images, tmp_path):
    from mpp import checkpoint

    objective = fit(tmp_path, images, replace(FEW, precision="bfloat16", ema=0.9))
    assert {parameter.dtype for parameter in objective.parameters()} == {torch.float32}
    _, state = checkpoint.load_latest(tmp_path / "checkpoints")
    assert set(state) == {"model", "optimizer", "ema"}
    for name, tensors in state.items():
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}, name
        assert len(tensors) >= len(list(objective.parameters()))


@NO_BFLOAT16
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_resnet_trains_in_bfloat16(norm, images, tmp_path):
    objective, before = labelled(norm), labelled(norm).state_dict()
    config = replace(FEW, precision="bfloat16", micro_batch=20, ema=0.9)
    train(objective, images, config, out=tmp_path, log=LogConfig(every=1, pictures=0, tensorboard=False))
    assert all(math.isfinite(loss) for loss in losses(tmp_path).values())
    after = objective.state_dict()
    assert {value.dtype for value in after.values()} <= {torch.float32, torch.int64}
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved >= {name for name in after if name.endswith(("running_mean", "running_var", "conv2.weight"))}


# Looking on


def test_scores_and_pictures_do_not_change_training(images, tmp_path):
    config = replace(FEW, ema=0.9)
    fit(tmp_path / "blind", images, config)
    objective, seen = masked(), []

    def evaluate(stop) -> dict[str, float]:
        torch.rand(17)
        seen.append(objective.head.weight.clone())
        return {"val/loss": 1.0}

    log = LogConfig(every=1, pictures=2, tensorboard=True)
    train(objective, images, config, out=tmp_path / "watched", log=log, evaluate=evaluate, evaluate_every=4)
    assert digests(tmp_path / "watched", 6) == digests(tmp_path / "blind", 6)
    assert losses(tmp_path / "watched") == losses(tmp_path / "blind")
    assert [line["step"] for line in metrics(tmp_path / "watched") if "val/loss" in line] == [4, 6]
    names = sorted(path.name for path in (tmp_path / "watched" / "pictures").iterdir())
    assert names == [f"step-{step:08d}.png" for step in (2, 4, 6)]
    assert torch.equal(seen[-1], objective.head.weight), "the running average is what is scored"


def test_every_line_of_metrics_tells_all_there_is(images, tmp_path):
    train(masked(), images, FEW, out=tmp_path, log=LogConfig(every=2, pictures=0))
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [2, 4, 6]
    names = {"step", "loss", "accuracy", "commonest", "nearest", "lr", "norm", "images/s", "waiting", "memory"}
    for line in lines:
        assert line.keys() == names
        assert all(isinstance(value, int | float) and math.isfinite(value) for value in line.values())
        assert 0 <= line["waiting"] <= 1
        assert line["images/s"] > 1
        assert 50 < line["memory"] < 10**6, "MiB of a process with torch"
    board = EventAccumulator(str(tmp_path)).Reload()
    assert set(board.Tags()["scalars"]) == names - {"step"}
    for name in names - {"step"}:
        events = [(event.step, event.value) for event in board.Scalars(name)]
        assert events == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines]


def test_a_running_average_can_not_begin_in_the_middle(images, tmp_path):
    fit(tmp_path, images, replace(FEW, steps=3))
    with pytest.raises(CheckpointError, match=r"train\.ema: 0\.0 there, 0\.9 here"):
        fit(tmp_path, images, replace(FEW, ema=0.9))
    (tmp_path / "checkpoints/began.json").unlink()  # as an earlier version left it
    with pytest.raises(CheckpointError, match=r"no running average.* train\.ema"):
        fit(tmp_path, images, replace(FEW, ema=0.9))


# What is left to the machine


@pytest.mark.parametrize("batch", [1, 7, 64, 96, 1000, 4096])
@pytest.mark.parametrize("image", [(16, 16), (224, 224)])
def test_a_micro_batch_that_is_found_divides_the_batch(batch, image, images):
    objective = MaskedPatchPrediction(ViT(tiny_config(image=image, patch=4)))
    config = TrainConfig(steps=1, batch=batch, device="cpu")
    found = choose(objective, images, config)
    assert batch % found.micro_batch == 0
    assert found.precision == ("bfloat16" if multiplies_bfloat16(CPU) else "float32")
    assert found.compile is False
    assert found.threads == torch.get_num_threads()
    assert choose(objective, images, replace(config, **asdict(found))) == found
    if image == (16, 16):
        assert found.micro_batch == {1000: 250, 4096: 256}.get(batch, batch)


@pytest.mark.parametrize(("norm", "micro_batch"), [("batch", 4096), ("group", 512)])
def test_an_encoder_that_looks_across_the_batch_gets_the_whole_of_it(norm, micro_batch, images):
    config = TrainConfig(steps=1, batch=4096, device="cpu")
    assert choose(labelled(norm), images, config).micro_batch == micro_batch
    assert choose(labelled(norm), images, replace(config, micro_batch=64)).micro_batch == 64


class Across(Brightness):
    """An objective whose loss looks across its batch: the distance of each image's guess from the mean of all."""

    @property
    def needs(self):
        return Needs(whole_batch=True)


def test_an_objective_that_looks_across_the_batch_is_never_given_a_part_of_it(tiny_vit, images):
    config = TrainConfig(steps=1, batch=4096, device="cpu")
    assert choose(Across(tiny_vit), images, config).micro_batch == 4096
    with pytest.raises(ValueError, match=r"train.micro_batch \(64\) must be train.batch \(4096\): across looks across"):
        choose(Across(tiny_vit), images, replace(config, micro_batch=64))


class Timed(Brightness):
    """Notes what it sees of progress, in the forward pass and behind the step."""

    def __init__(self, encoder) -> None:
        super().__init__(encoder)
        self.seen: list[float] = []
        self.after: list[float] = []

    def forward(self, batch):
        loss, metrics = super().forward(batch)
        self.seen.append(self.progress.item())
        return loss * (1 + self.progress), metrics

    def after_step(self, progress):
        self.after.append(progress)
        assert self.progress.item() == pytest.approx(progress)


def test_progress_reaches_the_forward_pass_also_right_after_a_resume(images, tmp_path):
    def timed() -> Timed:
        torch.manual_seed(7)
        return Timed(ViT(tiny_config(image=(16, 16), patch=4, width=32, depth=1)))

    log = LogConfig(every=1, pictures=0, tensorboard=False)
    whole, first, second = timed(), timed(), timed()
    config = replace(FEW, micro_batch=20)
    train(whole, images, config, out=tmp_path / "whole", log=log)
    assert whole.seen == pytest.approx([step / 6 for step in range(6)])
    assert whole.after == pytest.approx([step / 6 for step in range(1, 7)])
    with pytest.raises(PowerCut):
        train(first, Cut(images, after=4), config, out=tmp_path / "halves", log=log)
    train(second, images, config, out=tmp_path / "halves", log=log)
    assert second.seen == pytest.approx([3 / 6, 4 / 6, 5 / 6])
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")


@pytest.mark.parametrize(
    ("results", "said"),
    [
        (lambda own: {}, "results\\(\\) gives none; its config says encoder"),
        (lambda own: {"encoder": own.encoder, "head": own.head}, "gives encoder, head; its config says encoder"),
        (
            lambda own: {"encoder": ViT(own.encoder.config)},
            "must be parts of the objective, .*; encoder is not",
        ),
        (lambda own: {"encoder": own.head}, "must be an mpp.Encoder that is a part of the objective"),
        (lambda own: None, "results\\(\\) gives none"),
    ],
)
def test_results_that_no_checkpoint_could_give_back_are_refused_before_the_first_step(results, said, images, tmp_path):
    objective = masked()
    objective.results = lambda: results(objective)
    with pytest.raises(TrainingError, match=said):
        train(objective, images, FEW, out=tmp_path)
    assert not objective.head.weight.any(), "no step was made"


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        (lambda loss: loss, "a loss and a dictionary of metrics, got Tensor"),
        (lambda loss: (loss.expand(2), {}), "float32 scalar with a gradient, got torch.float32 of shape \\(2,\\)"),
        (lambda loss: (loss.bfloat16(), {}), "got torch.bfloat16"),
        (lambda loss: (loss.detach(), {}), "with a gradient"),
        (lambda loss: (loss.item(), {}), "got float"),
        (lambda loss: (loss, {"red": 3.0}), "metrics must be scalar tensors by name, got 'red': float"),
        (lambda loss: (loss, {3: loss}), "by name, got 3"),
    ],
)
def test_outputs_that_can_not_be_trained_with_are_told_at_the_first_step(outputs, said, tiny_vit, images, tmp_path):
    objective = Brightness(ViT(tiny_config(image=(16, 16), patch=4)))
    whole = objective.forward
    objective.forward = lambda batch: outputs(whole(batch)[0])
    with pytest.raises(TrainingError, match=said):
        train(objective, images, FEW, out=tmp_path)


@pytest.mark.parametrize("changes", [{"steps": None}, {"steps": None, "epochs": 1.0}, {"steps": 0}, {"warmup": 0.5}])
def test_a_config_that_does_not_count_in_steps_is_refused(changes, images, tmp_path):
    with pytest.raises(ValueError, match="train.steps must be at least 1 and train.warmup a whole number of steps"):
        fit(tmp_path, images, replace(FEW, **changes))


def test_what_a_recipe_chooses_is_left_alone(images):
    config = TrainConfig(steps=1, batch=20, micro_batch=5, precision="float32", compile=True, device="cpu", threads=3)
    assert choose(masked(), images, config) == Execution("float32", True, 3, 5)


@NO_CUDA
def test_a_gpu_trains_compiled_in_bfloat16_with_the_micro_batch_that_fits(images, tmp_path):
    config = TrainConfig(steps=6, batch=20, lr=1e-3, device="cuda", save_every=3)
    found = choose(masked(), images, config)
    assert (found.precision, found.compile, found.micro_batch) == ("bfloat16", True, 20)
    assert torch.cuda.max_memory_allocated() < 0.05 * torch.cuda.mem_get_info()[1], "what was tried is not counted"
    objective = fit(tmp_path, images, config)
    assert {parameter.dtype for parameter in objective.parameters()} == {torch.float32}
    assert all(math.isfinite(loss) for loss in losses(tmp_path).values())


@NO_CUDA
def test_a_deterministic_run_on_a_gpu_goes_on_bit_for_bit(images, tmp_path):
    config = TrainConfig(steps=6, batch=20, lr=1e-3, device="cuda", save_every=3, deterministic=True)
    fit(tmp_path / "whole", images, config)
    with pytest.raises(PowerCut):
        fit(tmp_path / "halves", Cut(images, after=5), config)
    fit(tmp_path / "halves", images, config)
    assert digests(tmp_path / "halves", 6) == digests(tmp_path / "whole", 6)


@pytest.mark.usefixtures("no_workspace")
def test_cuda_is_prepared_before_choices_use_it(monkeypatch):
    """cuBLAS reads the variable once, so that after the first choice that may compute on a GPU it is too late."""
    monkeypatch.setattr("mpp.execution.multiplies_bfloat16", lambda device: os.environ[WORKSPACE])
    assert choose(masked(), None, replace(FEW, deterministic=True, precision="auto")).precision == "bfloat16"


@pytest.mark.usefixtures("no_workspace")
def test_a_deterministic_run_is_not_compiled_unless_told_so(monkeypatch):
    monkeypatch.setattr("mpp.execution.device_of", lambda name: torch.device("cuda"))
    monkeypatch.setattr("mpp.execution.multiplies_bfloat16", lambda device: True)
    config = replace(FEW, compile=None)
    found = [
        choose(masked(), None, replace(config, deterministic=deterministic, compile=compile)).compile
        for deterministic, compile in ((False, None), (True, None), (True, True))
    ]
    assert found == [True, False, True]


def test_a_share_of_a_gpus_memory_stays_free(monkeypatch, images):
    """A CPU stands for the GPU: what is held while micro-batches are tried, and let go before the peak is counted."""
    counted: list[bool] = []
    held: list[weakref.ref] = []

    def empty(*size, **settings):
        tensor = torch.zeros(*size, **settings)
        held.append(weakref.ref(tensor))
        return tensor

    def is_held() -> bool:
        return 80_000 in [one().nbytes for one in held if one() is not None]

    def forward(batch):
        assert is_held(), "0.08 of the memory is held"
        if len(batch) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.zeros((), requires_grad=True), {}

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (400_000, 1_000_000))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: counted.append(is_held()))
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr("mpp.execution.forward_pass", lambda *_: forward)
    whole = Execution("float32", False, 1, 20)
    assert _largest_that_fits(masked(), images, FEW, whole, [20, 10, 5, 4]) == 5
    assert counted == [False]


def test_a_device_that_is_not_there_is_named(images, tmp_path):
    absent = "mps" if not torch.backends.mps.is_available() else "cuda"
    with pytest.raises(ValueError, match=f"train.device: this machine has no {absent}; it has .*cpu"):
        fit(tmp_path, images, replace(FEW, device=absent))


def test_the_description_of_a_checkpoint_names_its_step(images, tmp_path):
    fit(tmp_path, images)
    described = json.loads((tmp_path / "checkpoints/step-00000003/state.json").read_text())
    assert described["step"] == 3


def test_decibels_are_those_of_the_whole_batch_whatever_its_parts(tmp_path):
    images = torch.randint(0, 256, (8, 3, 32, 48), dtype=torch.uint8)
    images[4:] = 128 + images[4:] // 64  # nearly flat: far more decibels than the others
    figures = {}
    for micro_batch in (8, 1):
        torch.manual_seed(0)
        objective = MAE(
            ViT(tiny_config(positions="sincos2d_mae")), MAEConfig(decoder=DecoderConfig(width=32, depth=1, heads=2))
        )
        config = TrainConfig(steps=1, warmup=0, batch=8, micro_batch=micro_batch, precision="float32", threads=1)
        out = tmp_path / f"{micro_batch}"
        train(objective, [images], config, out=out, log=LogConfig(every=1, pictures=0, tensorboard=False))
        [figures[micro_batch]] = read_lines(out / "metrics.jsonl")
    for name in ("psnr", "flat"):
        assert figures[1][name] == pytest.approx(figures[8][name], rel=1e-4)
