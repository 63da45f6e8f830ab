"""mpp/errors.py and how the command line says what a user can mend."""

import logging
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from shard_files import image, write_files
from tiny_runs import run, write_recipe

from mpp import cli
from mpp.checkpoint import CheckpointError
from mpp.errors import UserError, cause, counted, out_of_memory, printable, shown
from mpp.hardware import HardwareError
from mpp.recipe import RecipeError
from mpp.recipe.settled import RunError
from mpp.shards.tar import ShardError
from mpp.watch import TrainingError
from mpp.weights import WeightsError

KINDS = (CheckpointError, HardwareError, RecipeError, RunError, ShardError, TrainingError, WeightsError)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_user_can_mend_is_one_line_and_status_2(kind, monkeypatch, capsys):
    def fail(_: object) -> None:
        raise kind("a line\nand another")

    monkeypatch.setattr(cli.commands, "recipes", fail)
    with pytest.raises(SystemExit) as stop:
        cli.main(["recipes"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "mpp: a line and another\n"
    assert issubclass(kind, UserError)
    assert issubclass(kind, ValueError)


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fail(_: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(cli.commands, "recipes", fail)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["recipes"])


def test_causes_and_names_are_one_line():
    assert cause(OSError(28, "No space left on device", "/some/file")) == "No space left on device"
    assert cause(OSError("a\n  b")) == "a b"
    assert cause(MemoryError()) == "MemoryError"
    assert (shown("日本.jpg"), shown("a\nb"), shown("\udcff")) == ("日本.jpg", "'a\\nb'", "'\\udcff'")


def test_one_thing_is_counted_as_one():
    assert [counted(number, "shard") for number in (0, 1, 2)] == ["0 shards", "1 shard", "2 shards"]


def test_names_that_a_terminal_cannot_show_do_no_harm(tmp_path):
    source = write_files(tmp_path / "source", {"日本/a.jpg": image(0), "cat/b.jpg": image(1)})
    command = [sys.executable, "-m", "mpp", "shards", "make", str(source), str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert run.returncode == 0, run.stderr
    assert "cat, \\u65e5\\u672c" in run.stdout


def test_what_steers_a_terminal_is_escaped_wherever_it_stands(capsys, monkeypatch):
    """An arm's title, a class, a key: characters that turn text (U+202E), move the cursor or clear the screen."""
    hostile = "a\u202eb\x1b[2Jc\x9bd\te\ud800f"

    def say(_: object) -> None:
        logging.getLogger("mpp.test").warning("log %s", hostile)
        raise UserError(f"error {hostile}")

    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(cli.commands, "recipes", say)
    with pytest.raises(SystemExit):
        cli.main(["recipes"])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.isprintable() and line.startswith("mpp: ") for line in lines)
    assert printable(f"x\n{hostile}\n").splitlines() == ["x", r"a\u202eb\x1b[2Jc\x9bd\te\ud800f"]


def test_a_long_name_is_cut_in_the_middle():
    assert shown("a" * 400) == "a" * 400
    assert shown("a" * 5000 + "z").startswith("a" * 200 + "[...]a")
    assert shown("a" * 5000 + "z").endswith("az")
    assert len(shown("\u202e" * 10**6)) < 3000


# Memory


def test_memory_that_runs_out_is_known_whoever_says_so():
    for ask in (lambda: np.empty(2**45), lambda: torch.empty(2**45), lambda: bytearray(2**60)):
        with pytest.raises((MemoryError, RuntimeError)) as caught:
            ask()
        assert out_of_memory(caught.value).startswith("out of memory")
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**45)
    assert out_of_memory(caught.value) == "out of memory, 1.31e+05 GiB asked for at once"
    gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ...")
    assert out_of_memory(gpu) == "out of memory, 20.00 GiB asked for at once"
    assert out_of_memory(RuntimeError("shapes cannot be multiplied")) is None
    assert out_of_memory(OSError("out of memory")) is None


def test_a_model_that_does_not_fit_is_one_line_that_says_what_to_lower(small_shards, tmp_path):
    recipe = write_recipe(tmp_path, small_shards)
    result = run("pretrain", recipe, "model.width=240000", f"out={tmp_path / 'run'}")
    assert result.code == 2
    assert "building" in result.line
    assert re.search(r"out of memory, \S+ GiB asked for at once; lower model.width or model.depth", result.line)
    assert not (tmp_path / "run").exists()


def test_a_step_that_does_not_fit_is_one_line_that_says_what_to_lower(small_shards, tmp_path, monkeypatch):
    monkeypatch.setattr("mpp.loop.update", lambda *_: torch.empty(2**45))
    result = run("pretrain", write_recipe(tmp_path, small_shards), f"out={tmp_path / 'run'}")
    assert result.code == 2
    assert "with 4 images at a time: out of memory" in result.line
    assert "lower train.micro_batch (it is 4)" in result.line


def test_memory_that_runs_out_in_any_command_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("mpp.shards.check.splits", lambda _: torch.empty(2**45))
    result = run("shards", "check", tmp_path)
    assert (result.code, result.line.startswith("mpp: out of memory")) == (2, True)
