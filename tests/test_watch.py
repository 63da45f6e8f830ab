import importlib
import itertools
import json
import math
import os
import signal
import time
from dataclasses import replace

import pytest
from conftest import tiny_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import (
    FEW,
    LABELS,
    RECIPE,
    Brightness,
    Cut,
    digests,
    finished,
    fit,
    losses,
    masked,
    metrics,
    run,
    small_splits,
    start,
    write_recipe,
)

from mpp.data.read import read_shards
from mpp.errors import Terminated, terminable
from mpp.launch import Launch
from mpp.loop import train
from mpp.models.vit import ViT
from mpp.ranks import Ranks
from mpp.train_config import LogConfig
from mpp.watch import Interrupted, TrainingError, stop_signals


@pytest.fixture
def images(small_shards):
    return read_shards(small_shards, 20, seed=5)


# Signals


def test_signals_save_and_say_how_to_go_on(small_shards, tmp_path):
    recipe, steps = write_recipe(tmp_path, small_shards), 300
    settings = [f"train.steps={steps}", "train.save_every=1000", "train.ema=0.9", "eval.every=1000"]
    assert run("pretrain", recipe, *settings, f"out={tmp_path / 'whole'}").code == 0
    out, stopped = tmp_path / "stopped", []
    for number, least in [(signal.SIGTERM, 5), (signal.SIGINT, 20)]:
        process = start("pretrain", recipe, *settings, f"out={out}")
        deadline = time.monotonic() + 60
        while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_text().splitlines()) < least:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        result = finished(process)
        assert result.code == 128 + number
        step = max(line["step"] for line in metrics(out))
        assert step < steps
        expected = f"mpp: stopped by {number.name} after step {step}; run the same command again to go on"
        assert result.line == expected
        assert (out / f"checkpoints/step-{step:08d}/state.json").exists()
        stopped.append(step)
        least = step + 20
    assert run("pretrain", recipe, *settings, f"out={out}").code == 0
    assert stopped[0] < stopped[1]
    assert losses(out) == losses(tmp_path / "whole")
    assert sorted(losses(out)) == list(range(1, steps + 1)), "each step once, however often it was done"
    assert digests(out, steps) == digests(tmp_path / "whole", steps)
    name = "encoder.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    scalars = EventAccumulator(str(out), {"scalars": 0}).Reload()
    assert {event.step for event in scalars.Scalars("loss")} == set(range(1, steps + 1))


def test_a_signal_while_scoring_stops_after_that_step_which_is_saved(images, tmp_path):
    def evaluate(stop) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return {"val/loss": 1.0}

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="SIGTERM after step 2") as caught:
        fit(tmp_path, images, replace(FEW, save_every=100), evaluate=evaluate, evaluate_every=2)
    assert caught.value.number == signal.SIGTERM
    assert digests(tmp_path, 2)
    assert signal.getsignal(signal.SIGTERM) is before


class Twin(Ranks):
    """The first of two processes that read, draw and are told the same."""

    def __init__(self) -> None:
        super().__init__(Launch(0, 2, 0, 2))

    def each(self, *numbers):
        return [numbers] * 2

    def gathered(self, value):
        return [value] * 2

    def average(self, tensors):
        return list(tensors)

    def of_leading(self, tensors, own):
        return {name: own(name, tensor) for name, tensor in tensors.items()}

    def spread(self, tensors):
        pass


@pytest.mark.parametrize("processes", [1, 2])
def test_what_a_signal_keeps_from_being_scored_is_scored_by_a_later_start(processes, images, tmp_path, monkeypatch):
    """Also if another signal comes while that one scores."""
    signalled = 2

    def evaluate(stop) -> dict[str, float]:
        nonlocal signalled
        if signalled:
            signalled -= 1
            os.kill(os.getpid(), signal.SIGTERM)
        return {} if stop else {"val/loss": 1.0}

    if processes == 2:
        monkeypatch.setattr("mpp.loop.sharing", lambda images: Twin())
    for _ in range(2):
        with pytest.raises(Interrupted, match="SIGTERM after step 2"):
            fit(tmp_path, images, evaluate=evaluate, evaluate_every=2)
    fit(tmp_path, images, evaluate=evaluate, evaluate_every=2)
    assert [line["step"] for line in metrics(tmp_path) if "val/loss" in line] == [2, 4, 6]
    assert sorted(losses(tmp_path)) == [1, 2, 3, 4, 5, 6]


def test_signals_at_once_are_one_and_a_later_one_stops_at_once(monkeypatch):
    with terminable(), stop_signals() as signals:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert signals == [signal.SIGTERM], "the loop ends in order"
        now = time.monotonic()
        monkeypatch.setattr("mpp.watch.time.monotonic", lambda: now + 60)
        with pytest.raises(Terminated):
            os.kill(os.getpid(), signal.SIGTERM)
        assert signals == [signal.SIGTERM]


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return small_splits(tmp_path_factory.mktemp("splits"))


def in_module(place: str):
    """A function's module and name; a package may hide the module behind a function of its name."""
    module, _, name = place.rpartition(".")
    return importlib.import_module(module), name


def killed_at(monkeypatch, place: str, time: int, number: int) -> None:
    """Sends this process a signal when a function is called for the given time."""
    module, name = in_module(place)
    function, calls = getattr(module, name), itertools.count(1)

    def interrupted(*arguments, **options):
        if next(calls) == time:
            os.kill(os.getpid(), number)
        return function(*arguments, **options)

    monkeypatch.setattr(module, name, interrupted)


def left(out) -> dict[str, bytes]:
    """What a run leaves: the figures of each step but those of speed, pictures and weights."""
    lines = [{key: value for key, value in line.items() if key not in SPEED} for line in metrics(out)]
    found = {"metrics": "".join(sorted(json.dumps(line) + "\n" for line in lines)).encode()}
    kept = [path for path in out.rglob("*") if path.suffix in (".png", ".safetensors", ".yaml")]
    return found | {str(path.relative_to(out)): path.read_bytes() for path in kept if path.name != "recipe.yaml"}


SPEED = ("images/s", "waiting", "memory")
DRAWING, GRID = "mpp.run.evaluation.drawing", "mpp.log.picture_grid"  # called once a batch scored, once a grid made
SCORED = "eval: {every: 2, images: 20}\n"


@pytest.fixture(scope="module")
def scored(splits, tmp_path_factory):
    """A run of 6 steps that is scored, in five batches, and pictured every 2, and its recipe."""
    folder = tmp_path_factory.mktemp("scored")
    text = RECIPE.replace("path: PATH,", "path: PATH, val: test,").replace("save_every: 2", "save_every: 100, ema: 0.9")
    recipe = write_recipe(folder, splits, text.replace("pictures: 0", "pictures: 2, tensorboard: false") + SCORED)
    assert run("pretrain", recipe, f"out={folder / 'whole'}").code == 0
    return recipe, left(folder / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("place", "time", "step"), [(DRAWING, 3, 2), (DRAWING, 13, 6), (DRAWING, 15, 6), (GRID, 1, 2), (GRID, 3, 6)]
)
def test_a_signal_while_scoring_or_painting_is_obeyed_and_the_next_start_does_what_is_missing(
    place, time, step, number, scored, tmp_path, monkeypatch
):
    recipe, whole = scored
    with monkeypatch.context() as patch:
        killed_at(patch, place, time, number)
        stopped = run("pretrain", recipe, f"out={tmp_path / 'run'}")
    assert stopped.code == 128 + number
    name = signal.Signals(number).name
    assert stopped.line == f"mpp: stopped by {name} after step {step}; run the same command again to go on"
    assert digests(tmp_path / "run", step)
    assert not (tmp_path / "run/encoder.safetensors").exists()
    assert run("pretrain", recipe, f"out={tmp_path / 'run'}").code == 0
    assert [line["step"] for line in metrics(tmp_path / "run") if "val/loss" in line] == [2, 4, 6], "each exactly once"
    found = left(tmp_path / "run")
    assert found["metrics"] == whole["metrics"]
    assert {name: data for name, data in found.items() if "checkpoints" not in name} == {
        name: data for name, data in whole.items() if "checkpoints" not in name
    }


def test_what_was_scored_is_not_scored_again_by_another_start(scored, tmp_path, monkeypatch):
    recipe, whole = scored
    for _ in range(3):
        assert run("pretrain", recipe, f"out={tmp_path / 'run'}").code == 0
        monkeypatch.setattr(*in_module(DRAWING), lambda *_: pytest.fail("scored again"))
    assert left(tmp_path / "run") == whole


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_scoring_that_ends_fine_tuning_is_obeyed_and_the_next_start_scores(
    number, splits, tmp_path, monkeypatch
):
    recipe, out = write_recipe(tmp_path, splits, LABELS), tmp_path / "run"
    with monkeypatch.context() as patch:
        killed_at(patch, "mpp.eval.labelled.predict.label_numbers", 1, number)
        stopped = run("finetune", recipe, f"out={out}")
    assert (stopped.code, stopped.line) == (128 + number, "mpp: stopped")
    assert (out / "classifier.safetensors").exists()
    assert not (out / "scores.json").exists()
    again = run("finetune", recipe, f"out={out}")
    assert again.code == 0
    assert "top-1" in again.out
    assert (out / "scores.json").exists()


# What goes wrong


class Diverges(Brightness):
    """Its loss is not a number from the fifth forward pass on."""

    def forward(self, batch):
        loss, _ = super().forward(batch)
        return loss * (math.nan if len(self.drawn) >= 5 else 1.0), {}


@pytest.mark.parametrize("every", [1, 2, 100])
def test_a_loss_that_is_no_number_stops_the_run_and_saves_nothing(every, images, tmp_path):
    config = replace(FEW, steps=8, micro_batch=20, save_every=2)
    encoder = ViT(tiny_config(image=(16, 16), patch=4, width=32, depth=1))
    log = LogConfig(every=every, pictures=0, tensorboard=False)
    with pytest.raises(
        TrainingError, match="step 5: the loss is nan .*lower train.lr .it is 0.001.*train.clip"
    ) as caught:
        train(Diverges(encoder), images, config, out=tmp_path, log=log)
    assert "\n" not in str(caught.value)
    saved = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert saved == ["step-00000002", "step-00000004"]
    assert all(math.isfinite(value) for line in metrics(tmp_path) for value in line.values())


def test_a_run_that_diverges_exits_with_one_line(small_shards, tmp_path):
    recipe = write_recipe(tmp_path, small_shards)
    result = run("pretrain", recipe, "train.lr=1e30", "train.clip=null", "train.warmup=0", f"out={tmp_path / 'run'}")
    assert result.code == 2
    assert "train.lr" in result.line
    assert not list((tmp_path / "run").glob("checkpoints/step-*")) or digests(tmp_path / "run", 2)


def test_batches_that_end_too_soon_are_an_error(small_shards, tmp_path):
    once = read_shards(small_shards, 20, train=False)  # three batches
    with pytest.raises(TrainingError, match="batches ended before train.steps"):
        fit(tmp_path, once)


# Where time goes


def test_waiting_is_the_share_of_time_without_data(images, tmp_path):
    class Slow(Cut):
        def iterate(self, start, stop=()):
            for batch in super().iterate(start, stop):
                time.sleep(0.2)
                yield batch

    fit(tmp_path, Slow(images, 99), replace(FEW, steps=3))
    assert all(line["waiting"] > 0.5 for line in metrics(tmp_path))
    assert all(line["images/s"] < 100 for line in metrics(tmp_path)), "20 images in 0.2 s at best"


def test_the_time_of_scoring_is_not_counted_as_training(images, tmp_path):
    def evaluate(stop) -> dict[str, float]:
        time.sleep(1)
        return {"val/loss": 1.0}

    config = replace(FEW, steps=4)
    log = LogConfig(every=2, pictures=0, tensorboard=False)
    train(masked(), images, config, out=tmp_path, log=log, evaluate=evaluate, evaluate_every=3)
    [speed] = [line["images/s"] for line in metrics(tmp_path) if line["step"] == 4 and "loss" in line]
    assert speed > 40, "two batches of 20 in less than the second that scoring took"
