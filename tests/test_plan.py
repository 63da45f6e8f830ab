import re
from dataclasses import replace

import pytest
import torch
from tiny_runs import run, write_recipe
from torchvision.models import resnet18

from mpp.plan import activation_bytes, cost, duration, parameters, plan
from mpp.recipe import load_recipe
from mpp.train_config import Execution

# Parameters without a classifier: timm's vit_*_patch16_224 (H: patch14) with num_classes=0, as its tables count them.
PUBLISHED = {"Ti/16": 5_524_416, "S/16": 21_665_664, "B/16": 85_798_656, "L/16": 303_301_632, "H/14": 630_764_800}


def recipe_of(preset: str, *overrides: str):
    return load_recipe("paper/vit_b16_mpp", [f"model.preset={preset}", *overrides])


@pytest.mark.parametrize("preset", PUBLISHED)
def test_encoders_have_as_many_parameters_as_the_published_ones(preset):
    counts = parameters(recipe_of(preset))
    assert sum(count for name, count in counts.items() if name.startswith("encoder.")) == PUBLISHED[preset]
    width = recipe_of(preset).model.width
    assert counts["mask_token"] == width
    assert counts["head"] == 512 * width + 512


def flops(recipe) -> int:
    """Matrix products of one image by the closed formula; forward, and twice that backward but to the pixels."""
    model = recipe.model
    d, n, hidden = model.width, model.grid[0] * model.grid[1], model.hidden
    t, k = n + (model.pool == "cls"), max(1, round(recipe.objective.share * n))
    block = 2 * t * d * 3 * d + 4 * t * t * d + 2 * t * d * d + 4 * t * d * hidden
    last = 2 * t * d * 2 * d + 2 * k * d * d + 4 * k * t * d + 2 * k * d * d + 4 * k * d * hidden
    stem = 2 * n * model.patch**2 * model.channels * d
    return 3 * ((model.depth - 1) * block + last + 2 * k * d * 512) + 2 * stem


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [("B/16", ()), ("S/16", ("model.pool=avg",)), ("Ti/16", ("objective.share=0.15",)), ("L/16", ("model.image=384",))],
)
def test_flops_are_those_of_the_closed_formula(preset, overrides):
    recipe = recipe_of(preset, *overrides)
    counted = cost(recipe)
    assert counted == pytest.approx(flops(recipe), rel=0.01)


def test_the_formula_agrees_with_the_published_cost_of_vit_b16():
    # 17.58 G multiply-adds forward (DeiT, table 5, rounds to 17.6): all tokens in the last block, no head.
    model = recipe_of("B/16").model
    t, d = 197, model.width
    whole = 12 * (12 * t * d * d + 2 * t * t * d) + 196 * 768 * d
    assert whole / 1e9 == pytest.approx(17.58, rel=0.01)
    assert flops(recipe_of("B/16")) == pytest.approx(6 * whole, rel=0.06), "half of the last block is saved"


ONE = Execution("float32", False, 1, micro_batch=1)


def test_activations_grow_with_depth_and_shrink_with_the_patch():
    shallow, deep = (activation_bytes(recipe_of("Ti/16", f"model.depth={depth}"), ONE) for depth in (2, 6))
    longer = activation_bytes(recipe_of("Ti/8", "model.depth=2"), ONE)
    assert 2 < deep / shallow < 3.1
    assert 3.4 < longer / shallow < 4, "fused attention keeps no scores: linear in the 4 times as many tokens"


# Labels and ResNets


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


def resnet18_products(width: int, side: int, classes: int) -> tuple[int, int, int]:
    """Multiply-adds of the stem, of all other convolutions and of the head, for the stem without stride."""
    rest, inputs = 0, width
    for stage in range(4):
        outputs, pixels = width * 2**stage, (side // 2**stage) ** 2
        rest += 9 * inputs * outputs * pixels + 3 * 9 * outputs * outputs * pixels
        rest += inputs * outputs * pixels if stage else 0  # the shortcut
        inputs = outputs
    return 9 * 3 * width * side**2, rest, inputs * classes


@pytest.mark.parametrize(("width", "side"), [(4, 16), (16, 32)])
def test_a_resnets_flops_and_parameters_are_those_counted_by_hand(width, side, tmp_path):
    settings = [f"model.width={width}", f"model.image={side}", "objective.classes=[a, b]", f"data.path={tmp_path}"]
    recipe = load_recipe("cifar10/cnn", settings)
    stem, rest, head = resnet18_products(width, side, 2)
    counted = cost(recipe)
    assert counted == 2 * (2 * stem + 3 * rest + 3 * head), "backward twice forward, but for the stem's images"
    with torch.device("meta"):
        reference = resnet18()  # of width 64
    counts = parameters(recipe)
    for stage in range(1, 5):
        sizes = [(value.ndim, value.numel()) for value in reference.get_submodule(f"layer{stage}").parameters()]
        kernels, norms = (sum(size for ndim, size in sizes if ndim == wanted) for wanted in (4, 1))
        assert counts[f"encoder.layer{stage}"] == kernels * width**2 // 64**2 + norms * width // 64
    assert counts["encoder.conv1"] == 3 * 3 * 3 * width
    assert counts["encoder.bn1"] == 2 * width
    assert counts["head"] == 8 * width * 2 + 2


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
    without, with_average = (plan(replace(recipe, train=replace(recipe.train, ema=ema))) for ema in (0.0, 0.9))

    def state(text: str) -> int:
        return int(re.search(r"MiB: ([\d,]+) of parameters", text)[1])

    assert state(with_average) / state(without) == pytest.approx(5 / 4, rel=0.02)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 min 0 s"), (61.4, "1 min 1 s"), (3599.7, "1 h 0 min"), (90_000, "25 h 0 min")]
)
def test_durations_are_rounded_once(seconds, text):
    assert duration(seconds) == text
