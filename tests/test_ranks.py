"""One run on several processes is the run on one: the same images and draws, losses and weights but for rounding."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from many_processes import STARTED, close_weights, figures, left, lines, own_objectives, start
from ranks_worker import add_parts, by_hand, carry_out
from tiny_runs import metrics, run
from torch.distributed import HashStore

import mpp
from mpp import checkpoint, heartbeat
from mpp.hardware import HardwareError, device_of
from mpp.heartbeat import Heartbeat
from mpp.launch import Launch, LaunchError, launched, own_cores
from mpp.models.cnn import ResNet
from mpp.models.resnet_config import ResNetConfig
from mpp.shards.write import make_shards
from mpp.watch import TrainingError
from mpp.workers import cores

WORKER = Path(__file__).with_name("ranks_worker.py")
CLI = ("-m", "mpp")
ALL = """\
seed: 7
data: {path: DIGITS, val: test, threads: 1, augment: {crop: shift, pad: 1, flip: false}}
model: {image: 8, patch: 2, width: 32, depth: 3, heads: 2, positions: sincos2d, pool: avg, drop_path: 0.3}
train: {steps: 20, warmup: 4, batch: 48, micro_batch: 12, lr: 3e-3, ema: 0.8, device: cpu, threads: 1, save_every: 8,
  precision: float32}
eval: {every: 10, images: 100, knn: 90}
log: {every: 1, pictures: 10, tensorboard: false}
"""
RECIPES = {
    "masked": "objective: {name: mpp}",
    "bfloat16": """objective: {name: mpp, target: pixels}
train: {precision: bfloat16, activation_checkpointing: true}""",
    "labels": """
objective: {name: labels, mixup: 0.8, cutmix: 1, smoothing: 0.1, weights: [1, 2, 1, 1, 3, 1, 1, 1, 1, 5]}
model: {dropout: 0.1}
train: {clip: 0.5, layer_decay: 0.8}""",
    "across": "objective: {name: across}\ntrain: {micro_batch: auto}",
    "sgd": "objective: {name: mpp, target: pixels}\ntrain: {optimizer: sgd, lr: 0.05}",
}
WITH_FOUR = ("masked", "labels")  # processes; all with two
# Sums of gradients in another order differ in float32's last bits, 6e-8 of a number; a loss is a mean of such sums.
LOSS = 2e-6
# SGD moves weights by gradients, so they stay as close. Adam divides each gradient by its own size: where the true one
# is 0, as that of the keys' biases (softmax does not see them), its steps are rounding made as large as any other.
WEIGHTS = {"sgd": 1e-6, "bfloat16": 3e-2}


@pytest.fixture(scope="module", autouse=True)
def parts() -> Iterator[None]:
    with own_objectives(add_parts):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Recipes, and the runs of one process."""
    folder = tmp_path_factory.mktemp("ranks")
    make_shards("digits", folder / "digits", report=lambda line: None, progress=False)
    (folder / "recipes").mkdir()
    (folder / "all.yaml").write_text(ALL.replace("DIGITS", str(folder / "digits")))
    for name, text in RECIPES.items():
        (folder / f"recipes/{name}.yaml").write_text(f"base: ../all.yaml\n{text}")
    carry_out(folder / "recipes", folder / "1")
    return folder


@pytest.fixture(scope="module")
def shared(folder) -> Path:
    """The same runs by 2 and by 4 processes."""
    (folder / "some").mkdir()
    for name in WITH_FOUR:
        (folder / f"some/{name}.yaml").write_text((folder / f"recipes/{name}.yaml").read_text())
    for count, recipes in ((2, "recipes"), (4, "some")):
        ends = left(start(count, [str(WORKER), recipes, str(count), *["digits"] * (count == 2)], folder))
        assert [end.status for end in ends] == [0] * count, ends[0].said
    return folder


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    """Nothing that a test has started outlives it."""
    yield
    for process in STARTED:
        process.kill()
        process.communicate()
    STARTED.clear()


def equal_runs(one: Path, other: Path, weights: float, loss: float = LOSS) -> None:
    here, there = figures(one), figures(other)
    assert here.keys() == there.keys()
    for step, values in here.items():
        assert there[step] == pytest.approx(values, rel=loss, abs=loss), step
    close_weights(one / "encoder.safetensors", other / "encoder.safetensors", weights)


@pytest.mark.parametrize(("count", "name"), [*((2, name) for name in RECIPES), *((4, name) for name in WITH_FOUR)])
def test_several_processes_train_as_one(count, name, shared):
    rounding = 0.02 if name == "bfloat16" else LOSS  # of bfloat16: its numbers have 8 bits
    equal_runs(shared / f"1/{name}", shared / f"{count}/{name}", WEIGHTS.get(name, 1e-4), rounding)


def test_mpp_train_shares_batches_that_are_read_in_parts_in_a_callers_own_group(shared):
    by_hand(shared / "digits", shared / "1/by hand")
    one, two = (torch.load(shared / f"{count}/by hand/weights.pt", weights_only=True) for count in (1, 2))
    for here, there in zip(one, two, strict=True):
        torch.testing.assert_close(there, here, rtol=0, atol=1e-6)
    losses = [[line["loss"] for line in metrics(shared / f"{count}/by hand")] for count in (1, 2)]
    assert losses[1] == pytest.approx(losses[0], rel=LOSS)


def test_processes_that_would_train_each_by_itself_are_refused(shared, tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        TrainingError, match=r"2 processes were started together, and each would train by itself, into one"
    ):
        by_hand(shared / "digits", tmp_path)
    with pytest.raises(
        TrainingError, match=r"read as part 1 of 2, and this is process 0 of 1 .*read with rank=0, ranks=1"
    ):
        by_hand(shared / "digits", tmp_path, 1, 2)


def test_batch_norm_of_several_gpus_is_torchs_with_the_same_numbers():
    encoder = ResNet(ResNetConfig(image=(16, 16), depth=18, width=4, stem="small"))
    encoder.eval()
    images, before = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8), {**encoder.state_dict()}
    expected = encoder(images)
    torch.nn.SyncBatchNorm.convert_sync_batchnorm(encoder)
    assert any(isinstance(part, torch.nn.SyncBatchNorm) for part in encoder.modules())
    assert encoder.looks_across_batch
    assert all(
        value is before[name] or torch.equal(value, before[name]) for name, value in encoder.state_dict().items()
    )
    assert torch.equal(encoder(images), expected)


def layout(path: Path) -> dict[tuple[str, str], tuple[torch.dtype, torch.Size]]:
    """Type and shape of each tensor of a checkpoint, by file and name."""
    _, state = checkpoint.load(path)
    return {(file, key): (one.dtype, one.shape) for file, tensors in state.items() for key, one in tensors.items()}


def test_checkpoints_say_nothing_of_the_processes(shared):
    for name in WITH_FOUR:
        runs = [shared / f"{count}/{name}/checkpoints" for count in (1, 2, 4)]
        assert [checkpoint.steps(run) for run in runs] == [[16, 20]] * 3
        assert len({json.dumps(sorted(map(str, layout(run / "step-00000016").items()))) for run in runs}) == 1
    assert mpp.load_encoder(shared / "4/masked").config == mpp.load_encoder(shared / "1/masked").config


def test_a_signal_to_one_stops_all_at_the_same_step_and_other_numbers_of_processes_go_on(shared, tmp_path):
    recipe = str(shared / "recipes/masked.yaml")
    command = [*CLI, "pretrain", recipe, f"out={tmp_path / 'run'}", "train.steps=20"]
    processes = start(4, command, shared)
    wait_for(lambda: logged(tmp_path / "run") > 4)
    processes[2].send_signal(signal.SIGUSR1)
    ends = left(processes)
    assert [end.status for end in ends] == [128 + signal.SIGUSR1] * 4, ends[0].said
    (step,) = {max(checkpoint.steps(tmp_path / "run/checkpoints"))}
    assert [lines(end.said)[1:] for end in ends] == [
        [f"mpp: stopped by SIGUSR1 after step {step}; run the same command again to go on"], [], [], []
    ]  # fmt: skip
    assert 4 < step < 20
    ends = left(start(2, command, shared))
    assert [end.status for end in ends] == [0, 0], ends[0].said
    equal_runs(shared / "1/masked", tmp_path / "run", 1e-4)


def logged(out: Path) -> int:
    """Lines of metrics that a run has written so far."""
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(something, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not something():
        assert time.monotonic() < until
        time.sleep(0.02)


CNN = """objective: {name: labels}
model: {name: resnet, image: 8, depth: 18, width: 8, stem: small}
train: {steps: 4, batch: 48, device: cpu}
data: {path: DIGITS}"""


@pytest.mark.parametrize(
    ("text", "batch", "expected"),
    [
        ("masked", 51, "train.batch (51) must be a multiple of the number of processes, which is 2"),
        ("labels", 50, "train.batch (50) gives each of 2 processes 25 images, which must be even: labels mixes"),
        (CNN, 48, "batch norm looks across the whole batch, which several processes share on GPUs alone"),
        ("labels", 102, "data.last_batch: kept ends an epoch of 1442 images with a batch of 14, of which each of"),
        ("masked", 12, "data.last_batch: kept ends an epoch of 1442 images with a batch of 2, which 3 processes"),
    ],
)  # fmt: skip
def test_what_processes_cannot_share_is_one_line_and_all_are_gone(text, batch, expected, folder, tmp_path):
    (tmp_path / "r.yaml").write_text(text.replace("DIGITS", str(folder / "digits")))
    recipe = "r.yaml" if text == CNN else str(folder / f"recipes/{text}.yaml")
    command = [*CLI, "pretrain", recipe, f"out={tmp_path / 'run'}", "train.micro_batch=auto", f"train.batch={batch}"]
    kept = "kept" in expected
    ends = left(start(2 + (batch == 12), [*command, *["data.last_batch=kept"] * kept], tmp_path))
    (said,) = [line for end in ends for line in lines(end.said)]
    assert expected in said
    assert all(end.status for end in ends)
    assert not any("Traceback" in end.said for end in ends)


def test_draws_from_torchs_generator_are_refused(shared, tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/lucky.yaml").write_text(f"base: {shared / 'all.yaml'}\nobjective: {{name: lucky}}\n")
    ends = left(start(2, [str(WORKER), "recipes", "out"], tmp_path))
    assert "lucky: draws from torch's generator, by other numbers in each of 2 processes than in one" in "".join(
        end.said for end in ends
    )


def test_a_second_launch_into_a_folder_is_refused_and_the_first_goes_on(shared, tmp_path):
    command = [*CLI, "pretrain", str(shared / "recipes/masked.yaml"), f"out={tmp_path / 'run'}", "train.steps=400"]
    first = start(2, command, shared)
    wait_for(lambda: logged(tmp_path / "run") > 1)
    second = left(start(2, command, shared))
    told = [line for end in second for line in lines(end.said) if "in use by a run that is still going" in line]
    assert len(told) == 1
    assert all(end.status for end in second)
    assert all(process.poll() is None for process in first)
    first[0].terminate()
    assert [end.status for end in left(first)] == [128 + signal.SIGTERM] * 2


def test_a_killed_process_is_named_and_the_others_end(shared, tmp_path):
    command = [*CLI, "pretrain", str(shared / "recipes/masked.yaml"), f"out={tmp_path / 'run'}", "train.steps=4000"]
    processes = start(3, command, shared)
    wait_for(lambda: logged(tmp_path / "run") > 1)
    processes[1].kill()
    began = time.monotonic()
    ends = left(processes)
    assert time.monotonic() - began < 60
    assert all(end.status for end in ends)
    said = [line for end in ends for line in lines(end.said) if "is gone" in line]
    assert len(said) == 1
    assert f"process 1 of 3 ({os.uname().nodename}, process {processes[1].pid}) is gone" in said[0]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["recipes"], "every other verb is one process"),
        (["pretrain", "masked.yaml", "train.lrr=1"], "train.lrr: unknown key"),
        (["finetune", "masked.yaml"], "objective.name is mpp, expected labels"),
        pytest.param(["pretrain", "masked.yaml", "train.device=cuda"], "train.device: this machine has no cuda; it has",
                     marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")),
    ],
)  # fmt: skip
def test_what_all_find_before_they_know_of_each_other_is_told_once(command, expected, folder, monkeypatch):
    monkeypatch.chdir(folder / "recipes")
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    first = run(*command)
    assert expected in first.line
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (run(*command).code, run(*command).err, first.code) == (1, "", 2)


# The environment


def test_without_a_launcher_a_process_is_alone(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert launched() == Launch(0, 1, 0, 1)
    assert launched().leads


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (("x", "2", "0", "1"), "RANK=x in the environment: expected a whole number"),
        (("2", "2", "0", "1"), "RANK=2, WORLD_SIZE=2, LOCAL_RANK=0, LOCAL_WORLD_SIZE=1 in the environment don't go"),
        (("0", "2", "3", "2"), "LOCAL_RANK=3, LOCAL_WORLD_SIZE=2 in the environment don't go together"),
    ],
)
def test_an_environment_that_cannot_be_is_one_line(values, expected, monkeypatch):
    for name, value in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"), values, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=expected):
        launched()


def test_a_process_has_its_share_of_the_cores(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert own_cores() == cores()
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("mpp.launch.cores", lambda: 31)
    assert own_cores() == 7
    monkeypatch.setattr("mpp.launch.cores", lambda: 2)
    assert own_cores() == 1


def test_a_process_without_a_gpu_of_its_own_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name, value in {"RANK": "4", "WORLD_SIZE": "8", "LOCAL_RANK": "4", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        HardwareError, match=r"process 4 of 8 on this machine has no GPU of its own, as it has 4; .*node 4"
    ):
        device_of("auto")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert device_of("auto") == device_of("cuda") == torch.device("cuda", 3)


# The heartbeat


@pytest.fixture
def fast(monkeypatch) -> None:
    for name, seconds in {"BEAT": 0.02, "SILENT": 0.3, "LATE": 0.2, "LEAVING": 0.2}.items():
        monkeypatch.setattr(heartbeat, name, seconds)


def hearts(count: int) -> tuple[list[Heartbeat], list[list[str | None]]]:
    """Those of several processes in this one, and what each was ended with."""
    store, ended = HashStore(), [[] for _ in range(count)]
    found = [Heartbeat(store, Launch(rank, count), ended[rank].append) for rank in range(count)]
    for heart in found:
        heart.start()
    return found, ended


def test_hearts_that_beat_end_nobody(fast):
    found, ended = hearts(3)
    time.sleep(0.8)
    for heart in found:
        heart.stop()
    assert ended == [[], [], []]


def test_one_that_falls_silent_is_named_once_and_all_others_end(fast):
    found, ended = hearts(3)
    found[1].stop()
    wait_for(lambda: ended[0] and ended[2], 5)
    told = [line for line in (*ended[0], *ended[2]) if line]
    assert len(told) == 1
    assert told[0].startswith(
        f"process 1 of 3 ({os.uname().nodename}, process {os.getpid()}) gave no sign of life for 0"
    )


def test_a_process_that_was_stopped_itself_does_not_take_the_others_for_dead(fast, monkeypatch):
    found, ended = hearts(2)
    beat, gate = Heartbeat._beat, threading.Event()
    monkeypatch.setattr(
        Heartbeat, "_beat", lambda self: (gate.wait(), beat(self))
    )  # both stand still, as a paused container
    time.sleep(0.6)
    gate.set()
    time.sleep(0.3)
    for heart in found:
        heart.stop()
    assert ended == [[], []]


def test_only_the_first_to_fail_tells(fast):
    found, ended = hearts(3)
    assert [heart.fails(f"line {place}") for place, heart in enumerate(found)] == [True, False, False]
    assert found[2].failed() == "0 line 0"
    wait_for(lambda: ended[1] and ended[2], 5)
    assert ended[1] == ended[2] == [None], "they end without a word if they do not leave by themselves"


def test_who_is_late_is_who_has_asked_the_others_least_often(fast):
    found, _ = hearts(3)
    for heart, calls in zip(found, (7, 5, 7), strict=True):
        heart.calls = calls
    wait_for(lambda: found[0].late() == [1], 5)
    for heart in found:
        heart.stop()


def test_the_parts_of_all_processes_are_the_whole_batch(folder):
    batches = [mpp.read_shards(folder / "digits", 12, rank=rank, ranks=3, seed=4) for rank in range(3)]
    whole = mpp.read_shards(folder / "digits", 12, seed=4).at(5)
    parts = [one.at(5) for one in batches]
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    assert np.concatenate([part.places for part in parts]).tolist() == list(range(12))
    assert json.dumps(whole.places.tolist()) == json.dumps(list(range(12)))
    assert replace(whole, images=whole.images[:1]).places is not None
