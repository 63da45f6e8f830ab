"""mpp/errors.py and how the command line says what a user can mend."""

import os
import subprocess
import sys

import pytest
from shard_files import image, write_files

from mpp import cli
from mpp.checkpoint import CheckpointError
from mpp.errors import UserError, cause, counted, shown
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
