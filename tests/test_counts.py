import pytest
import torch
from torchvision.models import resnet18

from mpp.counts import activation_bytes, activations_on_cuda, blocks_of, cost, parameters
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


# Activations
ONE = Execution("float32", False, 1, micro_batch=1)


def test_activations_grow_with_depth_and_shrink_with_the_patch():
    shallow, deep = (activation_bytes(recipe_of("Ti/16", f"model.depth={depth}"), ONE) for depth in (2, 6))
    longer = activation_bytes(recipe_of("Ti/8", "model.depth=2"), ONE)
    assert 2 < deep / shallow < 3.1
    assert 3.4 < longer / shallow < 4, "fused attention keeps no scores: linear in the 4 times as many tokens"


def of_a_block(precision: str, *settings: str) -> tuple[int, int]:
    """What one block more keeps on CUDA, whatever the images and for an image."""
    deep, shallow = (activations_on_cuda(recipe_of("Ti/16", f"model.depth={d}", *settings), precision) for d in (4, 3))
    return deep[0] - shallow[0], deep[1] - shallow[1]


def test_a_block_keeps_on_cuda_what_a_count_by_hand_gives():
    width, tokens, heads = 192, 197, 3
    casts, kept = of_a_block("bfloat16")
    norm = 4 * width + 2 * 4  # its input in float32, mean and deviation
    attention = 2 * width + 2 * 3 * width + 2 * width + 4 * heads  # input, q k v, output, logarithms of the sums
    mlp = 2 * width + 2 * 2 * 4 * width  # input, and what goes into the GELU and comes out
    assert kept == tokens * (2 * norm + attention + mlp)
    assert casts == pytest.approx(2 * 12 * width**2, abs=64), "weights in bfloat16; the kernel's seeds are a few bytes"


def test_a_block_keeps_more_on_cuda_in_float32_and_no_casts():
    width, tokens = 192, 197
    casts, kept = of_a_block("float32")
    attention, mlp = 1 + 3 + 1, 1 + 4 + 4  # times the width: input, q k v, output; input, and the GELU's two sides
    norms = 2  # their inputs; what goes out goes into attention and MLP
    assert kept == pytest.approx(4 * width * tokens * (norms + attention + mlp), rel=0.02)
    assert casts <= 64


@pytest.mark.parametrize("setting", ["model.positions=relative", "model.pool=avg"])
def test_memory_on_cuda_is_linear_in_the_tokens(setting):
    short, long = (activations_on_cuda(recipe_of(f"Ti/{patch}", setting), "bfloat16")[1] for patch in (16, 8))
    assert long / short == pytest.approx(4, rel=0.05)


def test_checkpointing_keeps_the_inputs_of_blocks_and_one_block_on_cuda():
    one = activations_on_cuda(recipe_of("Ti/16", "model.depth=1"), "bfloat16")[1]
    setting = "train.activation_checkpointing=true"
    few, many = (activations_on_cuda(recipe_of("Ti/16", f"model.depth={d}", setting), "bfloat16")[1] for d in (4, 8))
    assert many - few == 4 * 197 * 192 * 2, "the residual stream of 4 blocks more, in bfloat16"
    assert few < 3 * one


@pytest.mark.parametrize("state", [(False, torch.float16), (True, torch.float32)])
def test_counting_for_cuda_leaves_autocast_as_it_was(state):
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    try:
        torch.set_autocast_enabled("cuda", state[0])
        torch.set_autocast_dtype("cuda", state[1])
        activations_on_cuda(recipe_of("Ti/16", "model.depth=1"), "bfloat16")
        assert (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")) == state
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def test_blocks_are_counted_one_by_one():
    assert blocks_of(recipe_of("B/16")) == (12 * 768**2 + 13 * 768,) * 12


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
