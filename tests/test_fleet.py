import json
import re

import pytest
from test_counts import PUBLISHED, recipe_of
from tiny_runs import run, write_recipe

from mpp.counts import activations_on_cuda, cost
from mpp.fleet import averages
from mpp.recipe import load_recipe
from mpp.train_config import TrainConfig

GIB = 2**30
PAPER = "paper/vit_b16_mpp"  # 1M steps of 4096 images


def figures(path, *arguments: object) -> dict:
    result = run("plan", *arguments, "--json", path / "plan.json")
    assert result.code == 0, result
    return json.loads((path / "plan.json").read_text()) | {"out": result.out}


@pytest.mark.parametrize("preset", ["B/16", "L/16"])
def test_eight_h100_are_planned_by_published_sizes_and_stated_speeds(preset, tmp_path):
    found = figures(tmp_path, PAPER, f"model.preset={preset}", "--gpus", 8, "--device", "h100")
    width = recipe_of(preset).model.width
    parameters = PUBLISHED[preset] + width + 512 * width + 512  # with the mask token and the head
    ddp, fsdp = found["estimates"]["DDP"], found["estimates"]["FSDP2"]
    for part, each in {"weights": 4, "gradients": 4, "optimizer": 8}.items():
        assert ddp["memory"][part] == each * parameters
        assert fsdp["memory"][part] == -(-each * parameters // 8)
    seconds = 512 * cost(recipe_of(preset)) / ({"B/16": 0.41, "L/16": 0.48}[preset] * 989e12)
    assert ddp["compute"] == fsdp["compute"] == pytest.approx(seconds)
    assert ddp["communication"] == pytest.approx(2 * 7 / 8 * 4 * parameters / (0.8 * 450e9))
    assert ddp["step"] == pytest.approx(seconds + ddp["communication"] + 40 * parameters / 3.35e12)
    assert ddp["run"] == pytest.approx(1_000_000 * ddp["step"])
    assert ddp["images/s"] == pytest.approx(4096 / ddp["step"])


def test_the_micro_batch_is_the_largest_that_fits_on_the_device(tmp_path):
    _, image = activations_on_cuda(recipe_of("L/16", "model.depth=6"), "bfloat16")
    sizes = {}
    for device, memory in {"h100": 79, "h200": 139}.items():
        found = figures(tmp_path, PAPER, "model.preset=L/16", "model.depth=6", "--device", device)
        found = found["estimates"]["one GPU"]
        state = sum(size for part, size in found["memory"].items() if part != "activations")
        room = 0.92 * memory * GIB - state
        sizes[device] = found["micro_batch"]
        assert found["micro_batch"] * image <= room < 2 * found["micro_batch"] * image
        assert found["communication"] == 0
    assert sizes["h100"] < sizes["h200"]


def test_a_plan_for_gpus_says_that_it_is_an_estimate_and_what_it_assumes():
    out = run("plan", PAPER, "--gpus", 16, "--device", "a100").out
    assert re.search(r"^estimate for +16 A100 SXM 80 GB on 2 nodes of up to 8, in bfloat16$", out, re.M)
    assert re.search(r"^  assumed +41 % of 312 TFLOP/s, 80 % of 200 GB/s between GPUs$", out, re.M)
    assert re.search(r"^ +DDP +FSDP2$", out, re.M)
    assert re.search(r"^weights +0.321 GiB +0.0201 GiB$", out, re.M)
    assert re.search(r"^fits 79 GiB +yes, \d+ % free +yes, \d+ % free$", out, re.M)
    assert re.search(r"^communication +[\d.]+ ms +[\d.]+ ms beside$", out, re.M)
    assert re.search(r"^whole run +\d+ h \d+ min +\d+ h \d+ min$", out, re.M)
    assert "not counted" not in out
    assert "micro-batch" in out
    assert not re.search(r"^memory +about", out, re.M), "of this machine"


def test_a_model_that_fits_nowhere_has_no_times():
    huge = ["model.width=65536", "model.heads=512", "model.depth=2"]
    out = run("plan", PAPER, *huge, "--gpus", 8, "--device", "h200").out
    assert re.search(r"^fits 139 GiB +no +no$", out, re.M)
    assert re.search(r"^whole run +- +-$", out, re.M)


def test_a_small_model_is_said_to_wait_for_launches(tmp_path):
    out = run("plan", "cifar10/mpp", f"data.path={tmp_path / 'none'}", "--gpus", 2, "--device", "h100").out
    assert re.search(r"not counted +launching kernels", out)
    assert "whole run" not in out, "how many steps 10 epochs are is not known"


def test_checkpointing_costs_another_forward_pass_through_blocks_and_saves_memory(tmp_path):
    plain, again = (
        figures(tmp_path, PAPER, f"train.activation_checkpointing={on}", "--device", "h100", "train.micro_batch=64")
        for on in ("false", "true")
    )
    d, t = 768, 197
    block = t * (24 * d * d + 4 * t * d) - 8 * t * d * d  # but for its last product, whose output nothing asks for
    extra = again["flops_an_image"] / plain["flops_an_image"] - 1
    assert extra == pytest.approx(11.5 * block / plain["flops_an_image"], rel=0.03), "half of the last is left out"
    plain, again = plain["estimates"]["one GPU"], again["estimates"]["one GPU"]
    assert again["compute"] / plain["compute"] == pytest.approx(1 + extra)
    assert again["memory"]["activations"] < 0.2 * plain["memory"]["activations"]


@pytest.mark.parametrize(("batch", "fits"), [(1024, True), (2**20, False)])
def test_an_encoder_with_batch_norm_takes_a_gpus_part_whole(batch, fits, tmp_path):
    settings = [f"data.path={tmp_path / 'none'}", "objective.classes=[a, b]", f"train.batch={batch}"]
    found = figures(tmp_path, "cifar10/cnn", *settings, "--gpus", 4, "--device", "a100")
    ddp = found["estimates"]["DDP"]
    assert (ddp["micro_batch"], ddp["fits"]) == (batch // 4, fits)
    assert ddp["compute"] == pytest.approx(batch // 4 * found["flops_an_image"] / (29.7 * 2.039e12))


def test_sgd_keeps_one_number_for_each_parameter_or_none():
    kept = {config: averages(TrainConfig(**dict(config))) for config in (
        (("optimizer", "adamw"),), (("optimizer", "sgd"),), (("optimizer", "sgd"), ("betas", (0.0, 0.9))),
    )}  # fmt: skip
    assert list(kept.values()) == [2, 1, 0]


# What was measured


@pytest.fixture
def on_an_h100(monkeypatch):
    """This machine's device goes by the name of that GPU."""
    monkeypatch.setattr("mpp.plan.device_name", lambda recipe: "NVIDIA H100 80GB HBM3")


@pytest.fixture
def tiny(small_shards, tmp_path):
    return write_recipe(tmp_path, small_shards)


def test_what_was_measured_on_one_gpu_stands_in_place_of_the_assumed_speed(on_an_h100, tiny, tmp_path):
    there = figures(tmp_path, tiny, "--measure")
    (tmp_path / "there.json").write_text(json.dumps(there))
    speed = there["measured"]["images/s"]
    found = figures(tmp_path, tiny, "--gpus", 2, "--device", "h100", "--measured", tmp_path / "there.json")
    assert found["estimates"]["DDP"]["compute"] == pytest.approx(4 / speed)
    source = re.escape(f"{speed:,.0f} images/s on one NVIDIA H100 80GB HBM3 ({tmp_path / 'there.json'})")
    assert re.search(f"^  measured +{source}$", found["out"], re.M)
    assert "TFLOP/s" not in found["out"]
    assert "80 % of 450 GB/s between GPUs" in found["out"]


def test_what_is_measured_here_is_used_at_once(on_an_h100, tiny, tmp_path):
    found = figures(tmp_path, tiny, "--measure", "--gpus", 2, "--device", "h100", "train.micro_batch=4")
    assert found["estimates"]["DDP"]["compute"] == pytest.approx(4 / found["measured"]["images/s"])


GOOD = {"measured": {"device": "NVIDIA H100 80GB HBM3", "images/s": 900.0}, "flops_an_image": 1e9}
WRITTEN = "what `mpp plan --measure --json` writes"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, f"expected {WRITTEN} (No such file or directory)"),
        ("{", f"expected {WRITTEN} (Expecting property name"),
        ("[]", f"expected {WRITTEN} (list indices"),
        (json.dumps({"flops_an_image": 1}), f"expected {WRITTEN} (measured is missing)"),
        (json.dumps(GOOD | {"flops_an_image": -1}), "expected a device and figures above 0"),
        (json.dumps(GOOD | {"flops_an_image": True}), "expected a device and figures above 0"),
        ('{"measured": {"device": "H100", "images/s": NaN}, "flops_an_image": 1}', "expected a device and figures"),
        (
            json.dumps(GOOD | {"measured": {"device": "NVIDIA A100", "images/s": 9}}),
            "measured on NVIDIA A100, expected",
        ),
        (json.dumps(GOOD), "was measured at 1 GFLOP an image, and this recipe has 101.7; measure it with"),
    ],
)
def test_a_file_that_holds_no_fitting_speed_is_refused_by_one_line(text, said, tmp_path):
    path = tmp_path / "there.json"
    if text is not None:
        path.write_text(text)
    result = run("plan", PAPER, "--device", "h100", "--measured", path)
    assert result.code == 2
    assert result.line.startswith(f"mpp: {path}: {said}"), result.line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", 7, "--device", "h100"], "--gpus 7: train.batch (4096) must be a multiple of the number of GPUs"),
        (["--gpus", 8], "--gpus 8: give the kind of GPU as well: --device h100, h200, a100"),
        (["--measured", "x"], "--measured: give the kind of GPU as well: --device h100, h200, a100"),
        (
            ["--gpus", 4, "--device", "h100", "train.batch=96", "train.micro_batch=16"],
            "--gpus 4: train.micro_batch (16) must divide each GPU's 24 images of train.batch (96); "
            "give train.micro_batch=auto",
        ),
        (
            ["--device", "h100", "--measure", "train.device=cpu"],
            "--measure: measured on cpu, expected a GPU of --device h100",
        ),
    ],
)
def test_gpus_that_cannot_be_planned_for_are_refused_by_one_line(arguments, said):
    result = run("plan", PAPER, *arguments)
    assert (result.code, result.line) == (2, f"mpp: {said}")


@pytest.mark.parametrize("arguments", [["--gpus", "0"], ["--gpus", "1.5"], ["--device", "b100"]])
def test_gpus_that_there_are_not_are_refused(arguments):
    result = run("plan", PAPER, *arguments)
    assert result.code == 2
    assert "Traceback" not in result.err
    assert arguments[-1] in result.err.splitlines()[-1]


def test_a_plan_for_gpus_names_what_is_planned_in_its_json(tmp_path):
    found = figures(tmp_path, PAPER, "--gpus", 4, "--device", "h200")
    assert (found["recipe"], found["gpus"], found["device"]) == ("paper-vit_b16_mpp", 4, "h200")
    assert found["images"] == 4096 * 1_000_000
    assert found["flops_an_image"] == cost(load_recipe(PAPER))
    assert {"mpp", "torch"} <= found["versions"].keys()
