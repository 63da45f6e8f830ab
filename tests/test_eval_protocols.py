import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from test_eval_compare import recipes
from test_eval_probe import nearest_mean
from test_eval_report import Page
from tiny_runs import run, small_splits

from mpp.errors import UserError
from mpp.eval import PROTOCOLS, Row
from mpp.eval.compare.arms import ArmConfig, CompareConfig
from mpp.eval.compare.summary import table
from mpp.eval.probes.protocols import Protocol, cheap, check_names
from mpp.objectives import OBJECTIVES
from mpp.objectives.base import Objective
from mpp.objectives.config import Metric, ObjectiveConfig

ARMS = {"scratch": ArmConfig("tune")}
SMALL = [f"compare.arms.{name}=null" for name in ("labels", "few", "cnn", "scratch_total")]
SMALL += ["compare.seeds=[0]", "compare.images=[]", "compare.lrs=[]", "compare.choose_at=null"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return small_splits(tmp_path_factory.mktemp("splits"))


@dataclass(frozen=True)
class BrightnessConfig(ObjectiveConfig):
    name: str = "brightness"

    metrics: ClassVar = {
        "near": Metric("Images whose brightness is met", share=True),
        "always": Metric("Images that one answer meets", share=True, guess=True),
    }
    pictures: ClassVar = {"seen": "what is looked at", "upside_down": "the same on its head"}


class Brightness(Objective):
    """Predicts the mean colour of an image."""

    def __init__(self, encoder, config) -> None:
        super().__init__(encoder, config)
        self.head = torch.nn.Linear(encoder.width, 1)

    def forward(self, batch):
        truth = batch.images.float().mean((1, 2, 3)) / 255
        off = (self.head(self.encoder(batch.images)).float().squeeze(1) - truth).abs()
        metrics = {"near": (off < 0.1).float().mean(), "always": ((truth - 0.5).abs() < 0.1).float().mean()}
        return off.mean(), {name: value.detach() for name, value in metrics.items()} | {"odd": off.max().detach()}

    def pictures(self, batch):
        return {"seen": batch.images, "upside_down": batch.images.flip(2)}


@pytest.fixture
def extended(own_parts) -> None:
    """A protocol and an objective of one's own."""
    PROTOCOLS.add("nearest-mean", title="Nearest mean", text="The class whose mean <is> nearest.", rows=nearest_mean)
    OBJECTIVES.add("brightness", BrightnessConfig, Brightness)


def compared(recipe: Path, out: Path, *settings: str) -> dict:
    result = run("compare", recipe, f"out={out}", *SMALL, *settings)
    assert result.code == 0, result.err
    return json.loads((out / "results.json").read_text())


def test_every_protocol_and_what_comes_from_outside_is_run_and_shown(extended, shards, tmp_path):
    recipe, out = recipes(tmp_path, shards), tmp_path / "out"
    text = (tmp_path / "pre.yaml").read_text()
    (tmp_path / "pre.yaml").write_text(text.replace("{name: mpp}", "{name: brightness}"))
    first = compared(recipe, out, "compare.protocols=[knn]", "compare.fractions=[0.5]")
    assert {(row["protocol"], row["fraction"]) for row in first["rows"]} == {("knn", 0.5)}

    everything = ", ".join(["finetune", *PROTOCOLS])
    results = compared(recipe, out, f"compare.protocols=[{everything}]", "compare.fractions=[0.5, 1.0]")
    found = {(row["arm"], row["protocol"], row["fraction"]) for row in results["rows"]}
    drawing = {name for name, protocol in PROTOCOLS.items() if protocol.draws_labels}
    both = [(arm, name) for arm in ("scratch", "mpp") for name in ("finetune", *PROTOCOLS)]
    assert found == {(*one, share) for one in both for share in (0.5, 1.0) if one[1] not in drawing or share == 1.0}
    assert [row for row in results["rows"] if row["protocol"] == "knn" and row["fraction"] == 0.5] == first["rows"]
    assert [protocol["name"] for protocol in results["protocols"]] == list(PROTOCOLS)

    head, scratch, mpp = table(results).splitlines()[:3]
    assert all(f"{name}, all labels" in head for name in ("finetune", *PROTOCOLS) if name not in drawing)
    assert "few-shot, 5-shot" in head, "what draws its own labels has no share of them"
    assert len(scratch.split("(n = 1)")) == len(mpp.split("(n = 1)")) == 2 * (1 + len(PROTOCOLS)) - len(drawing) + 1

    html = (out / "report.html").read_text()
    titles = {heading["text"] for heading in Page(html).all("h3")}
    assert titles > {protocol.title for protocol in PROTOCOLS.values()}
    assert "The class whose mean &lt;is&gt; nearest." in html
    text = Page(html).all("body")[0]["text"]
    for words in ("Images whose brightness is met, %", "Images that one answer meets", "Loss", "odd", "Accuracy, %"):
        assert words in text
    assert "Rows from the top: seen: what is looked at; upside_down: the same on its head." in text
    assert "nearest visible patch" not in text


def test_a_protocol_that_forgets_its_main_figure_is_one_line_of_the_table(extended, shards, tmp_path):
    PROTOCOLS.add("odd", title="Odd", text="Odd.", rows=lambda task: [Row("odd", "top2", 0.5)])
    results = compared(recipes(tmp_path, shards), tmp_path / "out", "compare.protocols=[odd]", "compare.fractions=[1]")
    assert "odd: no figure top1, by which it is compared; it gave top2" in table(results).splitlines()
    assert "Odd" in (tmp_path / "out/report.html").read_text()


def test_a_comparison_runs_fine_tuning_and_the_cheap_ones_unless_it_names_others(extended):
    assert CompareConfig(ARMS).protocols == ("finetune", "linear", "few-shot", "knn", "nearest-mean")
    assert cheap() == ("linear", "few-shot", "knn", "nearest-mean")
    assert CompareConfig(ARMS, protocols=("nearest-mean", "linear-sgd", "finetune")).frozen == (
        "linear-sgd",
        "nearest-mean",
    )
    with pytest.raises(ValueError, match=r"compare.protocols: no protocol 'nearest-men'; did you mean nearest-mean\?"):
        CompareConfig(ARMS, protocols=("nearest-men",))


def test_names_are_checked_against_the_table_as_it_is(own_parts):
    with pytest.raises(UserError, match="no protocol 'mine'"):
        check_names(["mine"])
    part = PROTOCOLS.add("mine", "Mine", "What I do.", "mpp.eval.probes.knn:rows")
    assert part == Protocol("Mine", "What I do.", "mpp.eval.probes.knn:rows", "top1", True, False)
    check_names(["mine", "knn"])
