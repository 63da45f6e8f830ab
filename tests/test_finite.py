"""Weights, losses and figures that are not finite: refused, or left out by name, and never in a file."""

import json
import logging
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import shaken, tiny_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_export_convert import classifier, holding, saved
from tiny_runs import FEW, LABELS, RECIPE, Brightness, metrics, run, small_splits
from torch import nn

import mpp
from mpp.eval.labelled.scores import scores
from mpp.export.convert import convert
from mpp.finite import all_finite
from mpp.jsons import encoded, read_lines
from mpp.log import Log
from mpp.loop import train
from mpp.models.classifier import Classifier, Head
from mpp.models.vit import ViT
from mpp.objectives.labels import Classification
from mpp.train_config import LogConfig
from mpp.watch import TrainingError
from mpp.weights import WeightsError, load_classifier, load_encoder, save_classifier, save_encoder

BAD = (math.nan, math.inf, -math.inf)
QUIET = LogConfig(every=1, pictures=0, tensorboard=False)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_one_number_among_many_is_found_wherever_it_stands(bad, dtype):
    for place in (0, 17, 9999):
        tensor = torch.randn(10_000).to(dtype)
        assert all_finite(tensor)
        tensor[place] = bad
        assert not all_finite(tensor)
    assert all_finite(torch.empty(0))
    assert all_finite(torch.tensor(3))
    assert all_finite(torch.full((9,), torch.finfo(dtype).max, dtype=dtype)), "large is not infinite"


# Files of weights


def broken(path: Path, name: str, bad: float = math.nan, dtype: torch.dtype = torch.float32) -> None:
    """Puts a number into one tensor of a safetensors file, whose metadata stay."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors[name] = tensors[name].to(dtype)
    tensors[name].view(-1)[-1] = bad
    save_file(tensors, path, metadata)


def refused(path: Path, load=load_encoder, **facts) -> str:
    with pytest.raises(WeightsError) as caught:
        load(path, **facts)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert "not finite" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("bad", BAD)
def test_our_own_files_are_refused_by_file_and_tensor(bad, tmp_path):
    encoder = shaken(ViT(tiny_config()))
    save_encoder(encoder, tmp_path / "e.safetensors")
    save_classifier(classifier(encoder), tmp_path / "c.safetensors")
    assert load_encoder(tmp_path / "c.safetensors")
    broken(tmp_path / "e.safetensors", "blocks.1.norm1.weight", bad)
    assert f"blocks.1.norm1.weight: 1 of 64 numbers are not finite, such as {bad:g}" in refused(
        tmp_path / "e.safetensors"
    )
    broken(tmp_path / "c.safetensors", "head.linear.bias", bad)
    assert "head.linear.bias" in refused(tmp_path / "c.safetensors", load_classifier)
    assert load_encoder(tmp_path / "c.safetensors"), "its encoder is whole"


@pytest.mark.parametrize(("dtype", "bad"), [(torch.float64, 1e300), (torch.float16, 1e6)], ids=str)
def test_numbers_that_a_cast_has_no_room_for_are_refused(dtype, bad, tmp_path):
    """1e300 is finite as float64 and infinite in float32; 1e6 was cast to infinity by whoever wrote the float16."""
    path = tmp_path / "e.safetensors"
    save_encoder(shaken(ViT(tiny_config())), path)
    broken(path, "norm.bias", bad, dtype)
    assert "norm.bias: 1 of 64 numbers are not finite, such as inf" in refused(path)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("to", ["timm", "huggingface"])
def test_others_files_are_refused_by_their_own_names(to, head, tmp_path):
    out = tmp_path / "out"
    convert(saved(classifier(holding(to)), tmp_path), out, to)
    names = [
        name for name in load_file(out / "model.safetensors") if ("head" in name or name.startswith("cla")) == head
    ]
    name = next(name for name in names if name.endswith("bias"))
    broken(out / "model.safetensors", name)
    assert f"{name}: 1 of" in refused(out, load_classifier)
    assert head or refused(out)


@pytest.mark.parametrize(("dtype", "bad"), [(np.float32, np.nan), (np.float64, -1e300), (np.float16, np.inf)])
def test_arrays_of_numpy_and_pickles_of_torch_are_refused(dtype, bad, tmp_path):
    given = holding("google")
    convert(saved(given, tmp_path), tmp_path / "npz", "google")
    with np.load(tmp_path / "npz/model.npz") as arrays:
        held = dict(arrays)
    name = "Transformer/encoder_norm/bias"
    held[name] = held[name].astype(dtype)
    held[name][0] = bad
    np.savez(tmp_path / "x.npz", **held)
    assert name in refused(tmp_path / "x.npz", heads=2, image=(32, 48))
    convert(saved(holding("timm"), tmp_path), tmp_path / "timm", "timm")
    tensors = load_file(tmp_path / "timm/model.safetensors")
    tensors["fc_norm.bias"] = torch.from_numpy(tensors["fc_norm.bias"].numpy().astype(dtype))
    tensors["fc_norm.bias"][0] = bad
    torch.save({"state_dict": tensors}, tmp_path / "x.pth")
    assert "fc_norm.bias: 1 of" in refused(tmp_path / "x.pth", heads=2, image=(32, 48))


def test_what_is_left_aside_may_be_anything(tmp_path):
    convert(saved(holding("huggingface"), tmp_path), tmp_path / "hf", "huggingface")
    file = tmp_path / "hf/model.safetensors"
    pooler = {"pooler.dense.weight": torch.full((32, 32), math.nan), "pooler.dense.bias": torch.ones(32)}
    save_file(load_file(file) | pooler, file)
    assert load_encoder(tmp_path / "hf").left_aside


# Commands


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return small_splits(tmp_path_factory.mktemp("splits"))


@pytest.fixture(scope="module")
def no_numbers(tmp_path_factory, shards) -> Path:
    """Weights of LABELS' encoder with a head, one number of each of which is none."""
    path = tmp_path_factory.mktemp("weights") / "classifier.safetensors"
    encoder = ViT(mpp.ViTConfig(image=(16, 16), patch=4, width=32, depth=2, heads=2, pool="avg"))
    save_classifier(Classifier(encoder, Head(32, 2, 0), ("class0", "class1")), path)
    broken(path, "encoder.norm.weight")
    return path


def recipe(folder: Path, text: str, shards: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text.replace("PATH", str(shards)))
    return path


@pytest.mark.parametrize(
    "command",
    [
        "predict {weights} {shards} --split test --out {out}/p.jsonl",
        "predict {weights} {shards} --split test",
        "embed {weights} {shards} {out}/e.npz --split test",
        "probe {weights} --data {shards} --protocol knn --json {out}/k.json",
        "convert {weights} {out}/timm --to timm",
        "convert {weights} {out}/own --to safetensors --encoder",
        "finetune {labels} --from {weights} out={out}/run",
        "pretrain {pretrain} --from {weights} out={out}/run model.depth=2 model.pool=avg",
    ],
)
def test_every_command_refuses_weights_that_are_not_finite_in_one_line(command, no_numbers, shards, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "a").mkdir()
    places = {"labels": recipe(tmp_path, LABELS, shards), "pretrain": recipe(tmp_path / "a", RECIPE, shards)}
    places |= {"weights": no_numbers, "shards": shards, "out": out}
    result = run(*command.format(**places).split())
    assert result.code == 2
    assert str(no_numbers) in result.line
    assert "norm.weight: 1 of 32 numbers are not finite, such as nan" in result.line
    assert list(out.rglob("*")) == [], "nothing is left"


def test_an_arm_of_such_weights_fails_by_name_in_a_comparison(no_numbers, shards, tmp_path):
    tune = LABELS.replace("PATH", str(shards))
    (tmp_path / "tune.yaml").write_text(tune)
    arms = f"{{scratch: {{finetune: tune}}, given: {{weights: {no_numbers}, finetune: tune}}}}"
    text = f"base: tune.yaml\ncompare: {{seeds: [0], protocols: [finetune, knn], arms: {arms}}}\n"
    (tmp_path / "c.yaml").write_text(text)
    result = run("compare", tmp_path / "c.yaml", f"out={tmp_path / 'out'}", "train.steps=1", "train.warmup=0")
    assert result.code == 1
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert {row["arm"] for row in found["rows"]} == {"scratch"}
    assert len(found["failures"]) == 2
    assert all("norm.weight: 1 of 32 numbers are not finite" in one["error"] for one in found["failures"])


def test_finite_weights_whose_answers_are_not_are_refused_with_the_image(shards, tmp_path):
    assert (
        run(
            "finetune", recipe(tmp_path, LABELS, shards), f"out={tmp_path / 'run'}", "train.steps=1", "train.warmup=0"
        ).code
        == 0
    )
    path = tmp_path / "run/classifier.safetensors"
    broken(path, "encoder.norm.bias", 3e38)
    broken(path, "head.linear.weight", 3e38)
    assert all(map(all_finite, load_file(path).values()))
    result = run("predict", path, shards, "--split", "test", "--out", tmp_path / "p.jsonl")
    assert result.code == 2
    assert f"mpp: {shards}: split test: the predictions of " in result.err
    assert not (tmp_path / "p.jsonl").exists()


# Runs that become it


def vit() -> ViT:
    return ViT(tiny_config(image=(16, 16), patch=4, width=32, depth=1))


@pytest.fixture(scope="module")
def images(small_shards):
    return mpp.read_shards(small_shards, 20)


@pytest.mark.parametrize("save_every", [3, 100])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_last_step_that_breaks_the_weights_is_not_saved(images, tmp_path, save_every, ema):
    """Loss and gradient of the step are finite, the weights that it leaves are not."""

    class Breaks(Brightness):
        def after_step(self, progress):
            if progress == 1:
                with torch.no_grad():
                    self.encoder.norm.weight[3] = math.inf

    config = replace(FEW, save_every=save_every, ema=ema)
    with pytest.raises(
        TrainingError, match=r"step 6: encoder.norm.weight: 1 of 32 numbers are not finite, such as inf"
    ):
        train(Breaks(vit()), images, config, out=tmp_path, log=QUIET)
    assert [path.name for path in tmp_path.glob("checkpoints/step-*")] == ["step-00000003"] * (save_every == 3)


def test_statistics_of_batch_norm_count_and_an_objectives_own_notes_do_not(images, tmp_path):
    class Notes(Brightness):
        def __init__(self, encoder, broken):
            super().__init__(encoder)
            self.register_buffer("best", torch.tensor(math.inf))  # the lowest loss so far, say
            self.encoder.register_module("batch_norm", nn.BatchNorm1d(3))
            self.broken = broken

        def after_step(self, progress):
            if self.broken:
                self.encoder.batch_norm.running_var[1] = math.inf

    train(Notes(vit(), False), images, FEW, out=tmp_path / "notes", log=QUIET)
    with pytest.raises(TrainingError, match="step 3: encoder.batch_norm.running_var"):
        train(Notes(vit(), True), images, FEW, out=tmp_path / "broken", log=QUIET)


def test_an_evaluation_without_a_finite_loss_stops_the_run(shards, tmp_path, monkeypatch):
    def forward(self, batch, ahead=Classification.forward):
        loss, found = ahead(self, batch)
        return (loss if self.training else loss * math.inf), found

    monkeypatch.setattr(Classification, "forward", forward)
    result = run("finetune", recipe(tmp_path, LABELS, shards), f"out={tmp_path / 'run'}", "train.save_every=1")
    assert result.code == 2
    assert "the loss on split test is inf, though that of training is finite" in result.line
    assert not (tmp_path / "run/scores.json").exists()
    assert not any("val/accuracy" in row for row in metrics(tmp_path / "run"))


def test_a_metric_that_is_not_finite_is_left_out_and_named_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING), Log(tmp_path, 0, 3, tensorboard=False) as log:
        log.scalars(1, {"loss": 1.0, "share": math.nan})
        log.scalars(2, {"loss": 0.5, "share": math.inf})
        log.scalars(3, {"loss": 0.25, "share": 0.5})
    assert metrics(tmp_path) == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 0.5},
        {"step": 3, "loss": 0.25, "share": 0.5},
    ]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: step 1: share is nan; left out where it is not finite"
    ]


def test_scores_of_logits_that_are_not_finite_are_refused():
    logits = torch.tensor([[1.0, 2.0], [math.nan, 0.0]])
    with pytest.raises(ValueError, match="finite"):
        scores(logits, torch.tensor([1, 0]))
    assert scores(logits, torch.tensor([1, -1])).n == 1


# JSON


def test_json_has_no_nan():
    assert encoded({"a": [1, 2.5, None]}) == b'{"a": [1, 2.5, null]}\n'
    with pytest.raises(ValueError, match="JSON compliant"):
        encoded({"a": [math.nan]})


def test_lines_that_are_none_and_values_that_are_no_numbers_are_left_out(tmp_path):
    lines = [
        '{"step": 1, "loss": NaN, "x": 2}',
        "[" * 100_000,
        "[1]",
        '{"step": 2',
        "\udcff",
        '{"step": 3}',
        '{"step": 4}',
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(lines), "utf-8", "surrogateescape")
    assert read_lines(tmp_path / "m.jsonl") == [{"step": 1, "x": 2}, {"step": 3}], "the last line lacks its end"


def test_all_of_mpp_writes_json_by_one_function():
    """`quoted` in differing.py repeats a user's value in a message, and writes no file."""
    root = Path(mpp.__file__).parent
    files = [*root.rglob("*.py"), *(root / "eval").resolve().rglob("*.py")]
    wrong = {"/".join(path.parts[-2:]) for path in files if re.search(r"\bjson\.dump", path.read_text())}
    assert wrong == {"mpp/jsons.py", "mpp/differing.py"}
