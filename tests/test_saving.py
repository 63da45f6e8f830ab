"""Checkpoints written in the background; `Disk` makes a disk slow, or breaks it, at moments that a test chooses."""

import itertools
import os
import signal
import threading
import time
import weakref
from dataclasses import replace

import pytest
import torch
from conftest import tiny_config
from tiny_runs import FEW, Brightness, PowerCut, digests, metrics, run, small_disk, write_recipe
from torch import Tensor

import mpp
from mpp import checkpoint, loop, saving
from mpp.checkpoint import CheckpointError
from mpp.data.read import read_shards
from mpp.loop import train
from mpp.models.vit import ViT
from mpp.saving import Writer, on_host
from mpp.train_config import LogConfig
from mpp.watch import Interrupted

FOREVER = 20.0  # seconds after which a test gives up
MOMENT = 0.15  # seconds in which something that should not happen would
NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU")


class Disk:
    """Holds up the writing of checkpoints while it is stuck, or lets it fail; knows what was begun and ended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.goes, self.error, self.said = threading.Event(), None, []
        self.goes.set()
        save, sync = checkpoint.save, checkpoint.sync

        def noted(folder, step, *rest, **more):
            self.said.append(f"begin {step}")
            try:
                return save(folder, step, *rest, **more)
            finally:
                self.said.append(f"end {step}")

        def slow(path) -> None:
            assert self.goes.wait(FOREVER)
            if self.error:
                raise self.error
            sync(path)

        monkeypatch.setattr(checkpoint, "save", noted)
        monkeypatch.setattr(checkpoint, "sync", slow)

    def goes_in(self, seconds: float) -> None:
        threading.Timer(seconds, self.goes.set).start()


@pytest.fixture
def disk(monkeypatch):
    disk = Disk(monkeypatch)
    yield disk
    disk.goes.set()


@pytest.fixture
def images(small_shards):
    return read_shards(small_shards, 20, seed=5)


def state(value: float) -> checkpoint.State:
    return {"model": {"w": torch.full((7, 3), value)}, "optimizer": {"w/step": torch.tensor(value)}}


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def ended(disk: Disk, step: int) -> None:
    """Waits until a write has ended, and its thread has had the time to say so."""
    end = time.monotonic() + FOREVER
    while f"end {step}" not in disk.said:
        assert time.monotonic() < end
        time.sleep(0.005)
    time.sleep(0.05)


# The copy


def test_a_copy_holds_the_values_of_then_and_each_tensor_once():
    weights, counter = torch.randn(4, 3).T, torch.tensor(3)
    before = weights.clone()
    copy = on_host({"model": {"w": weights, "n": counter}, "ema": {"w": weights.bfloat16(), "n": counter}})
    weights.zero_()
    counter += 1
    assert torch.equal(copy["model"]["w"], before)
    assert torch.equal(copy["ema"]["w"], before.bfloat16())
    assert copy["model"]["n"] == copy["ema"]["n"] == 3
    assert copy["model"]["n"] is copy["ema"]["n"]
    assert [one.dtype for one in copy["ema"].values()] == [torch.bfloat16, torch.int64]


@NO_CUDA
def test_a_copy_from_a_gpu_holds_the_values_of_then():
    tensors = {str(number): torch.full((2_000_000,), float(number), device="cuda") for number in range(50)}
    copy = on_host({"model": tensors})
    for tensor in tensors.values():
        tensor.fill_(-1)
    assert all((copy["model"][name] == float(name)).all() for name in tensors)
    assert {one.device.type for one in copy["model"].values()} == {"cpu"}


# The writer alone


def test_a_checkpoint_written_in_the_background_is_byte_for_byte_the_same(tmp_path):
    for step in (10, 20, 30, 40):
        checkpoint.save(tmp_path / "here", step, state(step), {"about": "x"}, 2, (10,))
    with Writer(tmp_path / "there", {"about": "x"}, 2, (10,)) as writer:
        for step in (10, 20, 30, 40):
            writer.write(step, state(step))
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    assert checkpoint.steps(tmp_path / "there") == [10, 30, 40]


def test_a_slow_disk_is_not_waited_for_but_by_the_next_checkpoint(disk, tmp_path):
    disk.goes.clear()
    with Writer(tmp_path, {}, 9) as writer:
        writer.write(1, state(1))
        writer.check()
        assert checkpoint.steps(tmp_path) == []
        second = threading.Thread(target=writer.write, args=(2, state(2)))
        second.start()
        second.join(MOMENT)
        assert second.is_alive()
        assert disk.said == ["begin 1"]
        disk.goes.set()
        second.join(FOREVER)
        assert not second.is_alive()
    assert disk.said == ["begin 1", "end 1", "begin 2", "end 2"]


def test_the_end_waits_until_all_is_on_the_disk(disk, tmp_path):
    disk.goes.clear()
    with Writer(tmp_path, {}, 9) as writer:
        writer.write(1, state(1))
        disk.goes_in(MOMENT)
    assert checkpoint.load(tmp_path / "step-00000001")[0] == 1


def test_an_error_of_training_waits_too_and_is_the_one_to_be_told(disk, tmp_path, caplog):
    for step, error in ((1, None), (2, OSError("the disk broke"))):
        disk.goes.clear()
        disk.error = error
        with pytest.raises(PowerCut), Writer(tmp_path, {}, 9) as writer:  # noqa: PT012
            writer.write(step, state(step))
            disk.goes_in(MOMENT)
            raise PowerCut
    assert checkpoint.steps(tmp_path) == [1]
    [said] = caplog.messages
    assert "step-00000002: could not be saved (the disk broke)" in said


@pytest.mark.parametrize("call", ["write", "check", "wait", "end"])
def test_whatever_is_called_next_tells_what_failed_and_nothing_more_is_written(call, disk, tmp_path, caplog):
    disk.error = OSError("the disk broke")
    with pytest.raises(CheckpointError, match="step-00000001: could not be saved"), Writer(tmp_path, {}, 9) as writer:  # noqa: PT012
        writer.write(1, state(1))
        ended(disk, 1)
        if call != "end":
            getattr(writer, call)(*[2, state(2)] if call == "write" else [])
            pytest.fail("it went on")
    assert disk.said == ["begin 1", "end 1"]
    assert list(tmp_path.iterdir()) == []
    assert not caplog.messages, "it is told once"


def test_a_bug_in_the_thread_comes_out_as_itself(monkeypatch, tmp_path):
    def bug(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(checkpoint, "save", bug)
    with pytest.raises(ZeroDivisionError) as caught, Writer(tmp_path, {}, 9) as writer:
        writer.write(1, state(1))
    assert "bug" in [one.name for one in caught.traceback]


def test_ctrl_c_does_not_wait_for_a_disk_that_hangs(disk, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "PATIENCE", MOMENT)
    disk.goes.clear()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Writer(tmp_path, {}, 9) as writer:  # noqa: PT012
        writer.write(1, state(1))
        raise KeyboardInterrupt
    assert MOMENT < time.monotonic() - started < MOMENT + 3
    disk.goes.set()
    ended(disk, 1)
    assert checkpoint.steps(tmp_path) == [1], "it was not cut either"


# Training


class Noted(Brightness):
    """Keeps what its weights were after each step."""

    def __init__(self) -> None:
        torch.manual_seed(7)
        super().__init__(ViT(tiny_config(image=(16, 16), patch=4, width=32, depth=1)))
        self.steps: list[dict[str, Tensor]] = []

    def after_step(self, progress: float) -> None:
        self.steps.append({name: value.clone() for name, value in self.state_dict().items()})


def noted(out, images, config=FEW, **options) -> Noted:
    objective = options.pop("objective", None) or Noted()
    train(objective, images, config, out=out, log=LogConfig(every=1, pictures=0, tensorboard=False), **options)
    return objective


class Before:
    """Batches before one of which something happens: `number` counts from 1, as steps do."""

    def __init__(self, batches, number: int, do) -> None:
        self.batches, self.number, self.do = batches, number, do

    def at(self, step):
        return self.batches.at(step)

    def iterate(self, start, stop=()):
        for step in itertools.count(start):
            if step + 1 == self.number:
                self.do()
            yield self.batches.at(step)


def test_training_goes_on_while_a_checkpoint_is_written_which_holds_what_was_at_its_step(disk, images, tmp_path):
    config = replace(FEW, ema=0.9, optimizer="adamw")
    noted(tmp_path / "calm", images, config)
    objective, seen = Noted(), []

    def at_last() -> None:
        seen.append((len(objective.steps), checkpoint.steps(tmp_path / "slow/checkpoints")))
        disk.goes.set()

    disk.goes.clear()
    noted(tmp_path / "slow", Before(images, 6, at_last), config, objective=objective)
    assert seen == [(5, [])], "two steps after it was begun none is written yet"
    for step in (3, 6):
        assert digests(tmp_path / "slow", step) == digests(tmp_path / "calm", step)
        saved = checkpoint.load(tmp_path / f"slow/checkpoints/step-{step:08d}")[1]["model"]
        assert saved.keys() == objective.steps[step - 1].keys()
        assert all(torch.equal(saved[name], value) for name, value in objective.steps[step - 1].items())
    assert not torch.equal(objective.steps[2]["head.weight"], objective.steps[4]["head.weight"])


def test_a_disk_that_fails_stops_the_run_before_its_next_step(disk, images, tmp_path):
    disk.error = OSError("the disk broke")
    objective = Noted()
    with pytest.raises(CheckpointError, match="step-00000003: could not be saved"):
        noted(tmp_path, Before(images, 5, lambda: ended(disk, 3)), objective=objective)
    assert len(objective.steps) == 4
    disk.error = None
    noted(tmp_path, images)
    assert checkpoint.steps(tmp_path / "checkpoints") == [3, 6]


def test_a_disk_that_fails_at_the_end_is_told_and_the_run_is_not_done(disk, images, tmp_path):
    disk.error = OSError("the disk broke")
    with pytest.raises(CheckpointError, match="step-00000006: could not be saved"):
        noted(tmp_path, images, replace(FEW, save_every=100))


def test_a_full_disk_is_one_line_of_the_command_and_leaves_no_result(small_shards, tmp_path):
    recipe = write_recipe(tmp_path, small_shards)
    with small_disk(tmp_path / "disk", kib=256) as full:  # the state takes more, all else less
        stopped = run("pretrain", recipe, f"out={full / 'run'}", "log.tensorboard=false")
        assert stopped.code == 2
        assert "step-00000002: could not be saved" in stopped.line
        assert "Traceback" not in stopped.err
        assert sorted(path.name for path in (full / "run/checkpoints").iterdir()) == ["began.json"]
        assert not (full / "run/encoder.safetensors").exists()


@pytest.mark.parametrize("step", [3, 5])
def test_a_run_that_is_interrupted_has_its_last_checkpoint_on_the_disk(step, disk, images, tmp_path):
    """At step 3 one is under way when the signal comes; at step 5 another is to be written behind it."""

    def evaluate(stop) -> dict[str, float]:
        if len(objective.steps) == step:
            disk.goes_in(MOMENT)
            os.kill(os.getpid(), signal.SIGTERM)
        return {"val/loss": 1.0}

    objective = Noted()
    disk.goes.clear()
    with pytest.raises(Interrupted, match=f"SIGTERM after step {step}"):
        noted(tmp_path, images, objective=objective, evaluate=evaluate, evaluate_every=1)
    found, saved = checkpoint.load_latest(tmp_path / "checkpoints")
    assert found == step == max(line["step"] for line in metrics(tmp_path))
    assert all(torch.equal(saved["model"][name], value) for name, value in objective.steps[-1].items())
    noted(tmp_path, images)
    assert checkpoint.steps(tmp_path / "checkpoints") == sorted({3, step, 6})


def test_a_signal_while_the_last_checkpoint_is_waited_for_is_obeyed(disk, images, tmp_path):
    def signalled() -> None:
        time.sleep(MOMENT)
        os.kill(os.getpid(), signal.SIGTERM)
        disk.goes_in(MOMENT)

    def evaluate(stop) -> dict[str, float]:
        disk.goes.clear()
        threading.Thread(target=signalled).start()
        return {}

    with pytest.raises(Interrupted, match="SIGTERM after step 6"):
        noted(tmp_path, images, replace(FEW, save_every=6), evaluate=evaluate, evaluate_every=6)
    assert digests(tmp_path, 6)


def test_an_error_of_training_leaves_the_checkpoint_that_is_being_written_whole(disk, images, tmp_path):
    def cut() -> None:
        assert disk.said == ["begin 3"]
        disk.goes_in(MOMENT)
        raise PowerCut

    disk.goes.clear()
    with pytest.raises(PowerCut):
        noted(tmp_path, Before(images, 4, cut))
    assert checkpoint.load_latest(tmp_path / "checkpoints")[0] == 3


def test_one_copy_of_the_state_is_in_memory_at_a_time(disk, images, tmp_path, monkeypatch):
    taken, take = [], loop.snapshot

    def snapshot(*arguments) -> checkpoint.State:
        assert sorted(disk.said[-2:]) in ([], [f"begin {len(taken)}", f"end {len(taken)}"])
        end = time.monotonic() + FOREVER  # the thread that wrote the last one may be about to let go of it
        while any(one() is not None for tensors in taken for one in tensors):
            assert time.monotonic() < end
            time.sleep(0.005)
        state = take(*arguments)
        taken.append([weakref.ref(tensor) for tensors in state.values() for tensor in tensors.values()])
        disk.goes.clear()
        disk.goes_in(MOMENT)
        return state

    monkeypatch.setattr(loop, "snapshot", snapshot)
    noted(tmp_path, images, replace(FEW, save_every=1, ema=0.9))
    assert len(taken) == 6


def test_an_encoder_is_loaded_from_a_folder_that_is_being_written(disk, images, tmp_path):
    objective, loaded = Noted(), []

    def load() -> None:
        ended(disk, 2)
        disk.goes.clear()

    def evaluate(stop) -> dict[str, float]:
        if len(objective.steps) == 5:
            assert disk.said[-1] == "begin 4"
            loaded.append(mpp.load_encoder(tmp_path))
            disk.goes.set()
        return {}

    config = replace(FEW, save_every=2)
    noted(tmp_path, Before(images, 3, load), config, objective=objective, evaluate=evaluate, evaluate_every=1)
    [encoder] = loaded
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, objective.steps[1][f"encoder.{name}"]), name
