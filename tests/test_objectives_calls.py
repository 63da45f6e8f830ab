"""What a user's own objective raises: one line with objective and method, and the traceback where it is asked for."""

import ast
from pathlib import Path
from typing import get_type_hints

import pytest
from tiny_runs import RECIPE, run

import mpp

OWN = """
from dataclasses import dataclass
import torch
import mpp


@dataclass(frozen=True)
class OwnConfig(mpp.ObjectiveConfig):
    name: str = "own"
    fails: str = "nothing"
    metrics = {"m": mpp.Metric("M")}
    pictures = {"input": "it"}


class Own(mpp.Objective):
    def __init__(self, encoder, config):
        super().__init__(encoder, config)
        self.head = torch.nn.Linear(encoder.width, 1)
        self.calls = 0
        if config.fails == "constructor":
            self.share = self.head.weight.mean().item()

    def forward(self, batch):
        self.calls += 1
        if self.config.fails == "forward" and self.calls > 3:
            {}["a key"]
        loss = self.head(self.encoder(batch.images)).float().pow(2).mean()
        late = self.config.fails == "metrics" and self.calls > 4
        return loss, {"m": torch.zeros(3 if late else ())}

    def after_step(self, progress):
        if self.config.fails == "after_step" and progress > 0.4:
            1 / 0

    def pictures(self, batch):
        return {"input": [1] if self.config.fails == "pictures" else batch.images}


mpp.OBJECTIVES.add("own", OwnConfig, Own)
"""


@pytest.mark.parametrize(
    ("fails", "words"),
    [
        ("nothing", None),
        ("forward", "objective own: forward(): KeyError: 'a key'"),
        ("after_step", "objective own: after_step(): ZeroDivisionError: division by zero"),
        ("metrics", "objective own: metrics: "),
        ("pictures", "own: pictures() must give uint8 (b, c, h, w), got input list"),
        ("constructor", "objective own: its constructor: RuntimeError: "),
    ],
)
def test_what_it_raises_late_is_one_line(fails, words, small_shards, tmp_path, own_parts):
    (tmp_path / "own.py").write_text(OWN)
    text = RECIPE.replace("PATH", str(small_shards)).replace("name: mpp", "name: own")
    (tmp_path / "r.yaml").write_text(text.replace("pictures: 0", "pictures: 2"))
    settings = [f"out={tmp_path / 'run'}", f"objective.fails={fails}", "log.tensorboard=false"]
    result = run("pretrain", tmp_path / "r.yaml", *settings, "--import", tmp_path / "own.py")
    if words is None:
        assert result.code == 0
        return
    assert result.code == 2
    assert words in result.line
    assert ("meta device" in result.line) == (fails == "constructor")


def test_the_traceback_comes_where_it_is_asked_for(small_shards, tmp_path, own_parts, monkeypatch):
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "r.yaml").write_text(RECIPE.replace("PATH", str(small_shards)).replace("name: mpp", "name: own"))
    monkeypatch.setenv("MPP_TRACEBACK", "1")
    settings = [f"out={tmp_path / 'run'}", "objective.fails=forward", "--import", tmp_path / "own.py"]
    result = run("pretrain", tmp_path / "r.yaml", *settings)
    assert result.code == 2
    assert 'own.py", line ' in result.err
    assert result.err.splitlines()[-1].startswith("mpp: objective own: forward(): KeyError")


def test_type_checkers_see_what_there_is():
    """Names are resolved when they are used; a type checker must know them all the same."""
    tree = ast.parse(Path(mpp.__file__).read_text())
    seen = {}
    for block in tree.body:
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING":
            seen = {name.asname: line.module for line in block.body for name in line.names}
    assert seen == mpp._HOMES
    assert get_type_hints(mpp.load_encoder)["return"] is mpp.Encoder
    assert get_type_hints(mpp.read_shards)["return"].__name__ == "Batches"
