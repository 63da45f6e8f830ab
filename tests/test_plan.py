import re
from dataclasses import replace

import pytest
from tiny_runs import run, write_recipe

from mpp.counts import parameters
from mpp.plan import duration, plan
from mpp.recipe import load_recipe


def plan_rows(*arguments: object) -> dict[str, str]:
    result = run("plan", *arguments)
    assert result.code == 0, result
    return dict(re.split(r"  +", line.strip(), maxsplit=1) for line in result.out.splitlines())


def label_flops(recipe, classes: int) -> int:
    """As `flops`, but all tokens go through the last block, and their average to the head."""
    model = recipe.model
    d, t = model.width, model.grid[0] * model.grid[1]
    block = 2 * t * d * 3 * d + 4 * t * t * d + 2 * t * d * d + 4 * t * d * model.hidden
    return 3 * (model.depth * block + 2 * d * classes) + 2 * 2 * t * model.patch**2 * 3 * d


@pytest.mark.parametrize("mixing", [(), ("objective.mixup=0.8", "objective.cutmix=1.0", "model.drop_path=0.1")])
def test_training_with_labels_is_planned_without_shards(mixing, tmp_path):
    settings = [f"data.path={tmp_path / 'none'}", "objective.classes=[a, b, c]", *mixing]
    rows = plan_rows("cifar10/finetune", *settings)
    recipe = load_recipe("cifar10/finetune", settings)
    assert rows["head"] == f"{3 * 128 + 3}"
    blocks = 4 * (12 * 128**2 + 13 * 128)
    assert rows["encoder.blocks"] == f"{blocks:,}"
    assert rows["parameters"] == f"{blocks + (48 + 1) * 128 + 64 * 128 + 2 * 128 + 3 * 129:,}"
    assert float(rows["FLOPs an image"].split()[0]) * 1e9 == pytest.approx(label_flops(recipe, 3), rel=0.01)
    assert rows["micro-batch"].startswith("128 of 128 images")


def test_a_resnet_with_batch_norm_takes_its_batch_whole(tmp_path):
    rows = plan_rows("cifar10/cnn", f"data.path={tmp_path / 'none'}", "train.batch=4096", "train.precision=float32")
    assert rows["micro-batch"] == "4096 of 4096 images, float32"


@pytest.fixture
def tiny(small_shards, tmp_path):
    return write_recipe(tmp_path, small_shards)


def test_a_plan_says_what_a_recipe_takes(tiny):
    result = run("plan", tiny, "train.steps=100")
    assert result.code == 0
    rows = dict(re.split(r"  +", line.strip(), maxsplit=1) for line in result.out.splitlines())
    counts = parameters(load_recipe(tiny))
    assert rows["parameters"] == f"{sum(counts.values()):,}"
    assert all(rows[name] == f"{count:,}" for name, count in counts.items())
    assert rows["micro-batch"] == "4 of 8 images, float32"
    assert rows["rate"] == "0.001, a cosine down to 0 after 2 steps of warm-up"
    assert rows["steps"] == "100 = 15.1 epochs of 53 images"
    each, total = float(rows["FLOPs an image"].split()[0]) * 1e9, float(rows["FLOPs in all"])
    assert total == pytest.approx(each * 800, rel=0.02)
    assert re.fullmatch(r"about \d+ MiB: \d+ of parameters and optimizer, \d+ of activations", rows["memory"])
    assert "speed here" not in rows


def test_a_plan_says_where_a_constant_phase_ends(tiny, tmp_path):
    assert "constant after 2 steps of warm-up until 80 of 100 steps (that checkpoint is kept)" in (
        run("plan", tiny, "train.steps=100", "train.schedule=wsd").out
    )
    nowhere = ["cifar10/mpp", f"data.path={tmp_path / 'none'}", "train.schedule=wsd", "train.decay=0.1"]
    assert "constant after 0.5 epochs of warm-up until 9 of 10 epochs" in run("plan", *nowhere).out


def test_a_plan_needs_no_shards(tmp_path):
    result = run("plan", "cifar10/mpp", f"data.path={tmp_path / 'none'}")
    assert result.code == 0
    assert "no shards yet" in result.out
    assert not (tmp_path / "none").exists()


def test_a_plan_of_a_huge_batch_costs_no_memory(tmp_path):
    recipe = write_recipe(tmp_path, tmp_path / "nothing")
    sizes = ("model.image=512", "model.patch=64", "train.batch=262144")
    planned = run("plan", recipe, *sizes)  # 206 GB of pixels a batch
    assert planned.code == 0, planned.error


def test_a_plan_can_measure(tiny):
    result = run("plan", tiny, "--measure", "train.steps=100")
    assert result.code == 0
    [speed] = re.findall(r"speed here +([\d,.]+) images/s on cpu", result.out)
    assert float(speed.replace(",", "")) > 10
    assert re.search(r"time here +\d+ min \d+ s", result.out)


def test_memory_counts_the_running_average(tiny):
    recipe = load_recipe(tiny, ["model.width=512"])
    without, with_average = (str(plan(replace(recipe, train=replace(recipe.train, ema=ema)))) for ema in (0.0, 0.9))

    def state(text: str) -> int:
        return int(re.search(r"MiB: ([\d,]+) of parameters", text)[1])

    assert state(with_average) / state(without) == pytest.approx(5 / 4, rel=0.02)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 min 0 s"), (61.4, "1 min 1 s"), (3599.7, "1 h 0 min"), (90_000, "25 h 0 min")]
)
def test_durations_are_rounded_once(seconds, text):
    assert duration(seconds) == text
