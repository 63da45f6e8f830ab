import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from recipe_files import WHOLE, load, write

from mpp.errors import UserError
from mpp.models.presets import presets
from mpp.models.resnet_config import ResNetConfig
from mpp.objectives import OBJECTIVES, Needs, ObjectiveConfig
from mpp.objectives.predicted_config import bits_of
from mpp.recipe import RecipeError, list_recipes, load_recipe, save_recipe
from mpp.recipe.recipe import differences
from mpp.recipe.settled import Settled, load_settled
from mpp.train_config import Execution

pytestmark = pytest.mark.usefixtures("inside_tmp")

RESNET = """
objective: {name: labels}
data: {path: shards}
train: {steps: 10}
model: {name: resnet, image: 8, depth: 18, width: 4, stem: small}
"""


def refusal(text: str = "", *overrides: str, whole: str = WHOLE) -> str:
    with pytest.raises(RecipeError) as caught:
        load(text, *overrides, whole=whole)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Layers


def test_later_layers_win_and_keep_what_they_do_not_name():
    recipe = load("train: {lr: 2e-4, clip: null}", "train.lr=0.5", "seed=3")
    assert (recipe.train.lr, recipe.train.clip, recipe.train.steps, recipe.seed) == (0.5, None, 10, 3)


def test_bases_chain_each_relative_to_its_own_file():
    write("a/low.yaml", WHOLE)
    write("a/b/middle.yaml", "base: ../low.yaml\nseed: 1\ntrain: {lr: 1}")
    write("c/top.yaml", "base: ../a/b/middle.yaml\nseed: 2")
    recipe = load_recipe("c/top.yaml")
    assert (recipe.seed, recipe.train.lr, recipe.train.steps) == (2, 1.0, 10)


def test_an_error_names_the_layer_it_stands_in():
    write("low.yaml", WHOLE + "log: {evry: 3}")
    write("top.yaml", "base: low.yaml")
    with pytest.raises(RecipeError, match=r"^low\.yaml: log\.evry: unknown key\. Did you mean: every\?$"):
        load_recipe("top.yaml")


def test_a_circle_of_bases_is_refused_with_its_files():
    write("a.yaml", "base: b.yaml")
    write("b.yaml", "base: a.yaml")
    with pytest.raises(RecipeError, match=re.escape("a.yaml -> b.yaml -> a.yaml: recipes include each other")):
        load_recipe("a.yaml")


@pytest.mark.parametrize("base", ["none.yaml", "3", "[whole.yaml]"])
def test_a_base_that_is_no_file_is_refused(base):
    write("r.yaml", f"base: {base}")
    with pytest.raises(RecipeError, match=r"^r\.yaml: base: expected a file beside this one, found "):
        load_recipe("r.yaml")


def test_numbers_may_be_written_with_exponents_and_underscores():
    recipe = load("train: {lr: 2e-4, steps: 1_000_000, warmup: 1e4}")
    assert (recipe.train.lr, recipe.train.steps, recipe.train.warmup) == (2e-4, 1_000_000, 10_000)


def test_values_are_plain_python():
    recipe = load("model: {mean: [0.1, 0.2, 0.3]}\ntrain: {betas: [0, 1e-1]}", "objective.split=[0.5, 0.25, 0.25]")
    assert repr(recipe.model.mean) == "(0.1, 0.2, 0.3)"
    assert repr(recipe.train.betas) == "(0.0, 0.1)"
    assert repr(recipe.objective) == repr(OBJECTIVES["mpp"].config(name="mpp", split=(0.5, 0.25, 0.25)))


def test_one_number_is_a_square_image():
    assert load("model: {image: 32}").model.image == (32, 32)
    assert load("", "model.image=16").model.image == (16, 16)
    assert load("model: {image: [16, 32]}").model.image == (16, 32)


def test_micro_batch_is_a_number_or_auto():
    assert load("").train.micro_batch == "auto"
    assert load("train: {batch: 8, micro_batch: 4}").train.micro_batch == 4


# Kinds of encoder


def test_an_encoder_has_the_keys_of_its_kind():
    model = load("model: {norm: group}", "model.depth=34", whole=RESNET).model
    assert model == ResNetConfig(image=(8, 8), depth=34, width=4, stem="small", norm="group")
    assert load("").model.name == "vit"


@pytest.mark.parametrize("key", ["patch", "heads", "mlp", "pool", "positions", "drop_path"])
def test_keys_of_another_kind_of_encoder_are_refused_by_name(key):
    value = {"pool": "avg", "positions": "none"}.get(key, "2")
    assert refusal(f"model: {{{key}: {value}}}", whole=RESNET).startswith(f"r.yaml: model.{key}: unknown key. ")
    assert refusal("", f"model.{key}={value}", whole=RESNET).startswith(f"command line: model.{key}: unknown key. ")
    found = refusal("objective: {name: labels}", "model.name=resnet")
    assert found.startswith("whole.yaml: model.patch: unknown key. "), "a layer below that was for another kind"
    assert refusal("model: {norm: batch}") == 'r.yaml: model.norm: expected one of layer, rms, found "batch"'


LABELS_OVER = "objective: {name: labels, smoothing: 0.1}"


def test_another_objective_over_a_base_drops_what_the_base_says_of_its_own():
    base = WHOLE.replace("objective: {name: mpp}", "objective: {name: mpp, target: pixels, share: 0.3}")
    assert base != WHOLE
    assert load("", whole=base).objective.share == 0.3
    assert load(LABELS_OVER, whole=base).objective == OBJECTIVES["labels"].config(smoothing=0.1)
    assert load("", "objective.name=labels", whole=base).objective == OBJECTIVES["labels"].config()
    back = load(LABELS_OVER, "objective.name=mpp", whole=base).objective
    assert back == OBJECTIVES["mpp"].config(), "nothing of the first comes back"
    again = load("objective: {name: mpp, bits: 2}", whole=base).objective
    assert again == OBJECTIVES["mpp"].config(target="pixels", share=0.3, bits=2), "the same name keeps what is below"


def test_what_is_dropped_is_read_all_the_same():
    base = WHOLE.replace("objective: {name: mpp}", "objective: {name: mpp, shaer: 0.3}")
    found = refusal("", "objective.name=labels", whole=base)
    assert found == "whole.yaml: objective.shaer: unknown key. Did you mean: share?"
    assert "objective.share: unknown key" in refusal("", "objective.name=labels", "objective.share=0.3")


def test_a_base_of_an_objective_that_is_not_known_may_be_written_over():
    base = WHOLE.replace("objective: {name: mpp}", "objective: {name: of-somebody, strange: 3}")
    assert load("", "objective.name=mpp", whole=base).objective == OBJECTIVES["mpp"].config()
    found = refusal("", whole=base)
    names = ", ".join(OBJECTIVES)
    assert found.startswith(f'whole.yaml: objective.name: unknown "of-somebody". Expected one of: {names}')
    assert "--import" in found


def test_what_belongs_to_the_class_is_no_key():
    assert "unknown key" in refusal("objective: {pictures: {}}")
    assert "metrics" not in refusal("objective: {shaer: 3}")


# Views


VIEWS = "data: {views: {second: {count: 2, image: 16, augment: {pad: 1}}}}"


@pytest.fixture
def two_views(own_parts):
    """An objective that needs two views."""

    @dataclass(frozen=True)
    class TwoViews(ObjectiveConfig):
        name: str = "two-views"

        @property
        def needs(self) -> Needs:
            return Needs(views=2, whole_batch=True)

    OBJECTIVES.add("two-views", TwoViews, lambda encoder, config: None)


def test_views_are_checked_by_what_the_objective_needs(two_views):
    two = "objective: {name: two-views}"
    recipe = load(f"{two}\n{VIEWS}")
    assert recipe.view_sizes == [(16, 16), (16, 16)]
    assert recipe.data.views["second"].augment.pad == 1
    assert "needs 2 views of each image, and data.views has 0 beside the first" in refusal(two)
    assert "objective.name mpp looks at one view; data.views has 2 more" in refusal(VIEWS)
    patch = load("").model.patch
    found = refusal(f"{two}\n{VIEWS}", f"data.views.second.image={patch + 1}")
    assert found.startswith("command line: data.views.second.image: model.image")
    found = refusal(f"{two}\n{VIEWS}", "data.views.second.augment.grey=2")
    assert found == "command line: data.views.second.augment.grey must be in [0, 1], got 2.0"
    assert "unknown key. Did you mean: augment" in refusal(f"{two}\n{VIEWS}", "data.views.second.agument.grey=1")
    grid = "model: {mixer: mlp, pool: avg}"
    assert "model.mixer mlp has weights for images of (8, 8) alone" in refusal(f"{two}\n{VIEWS}\n{grid}")


def test_nested_tuples_that_were_settled_come_back_from_the_file_as_they_were(own_parts, tmp_path):
    @dataclass(frozen=True)
    class Nested(ObjectiveConfig):
        name: str = "nested"
        pairs: tuple[tuple[int, ...], ...] = ()

    OBJECTIVES.add("nested", Nested, lambda encoder, config: None)
    recipe, pairs = load("objective: {name: nested}"), ((1, 2), (3,))
    execution = Execution("float32", False, 1, 4)
    settled = Settled("3 images 0", None, None, {"pairs": pairs}, 10, 0, "all", "cpu", execution, {})
    settled.save(tmp_path)
    assert load_settled(tmp_path).fill(recipe).objective == Nested(pairs=pairs)


def test_the_order_of_views_counts_as_they_are_drawn_by_it(two_views):
    views = {name: f"{name}: {{image: 8}}" for name in "ab"}
    one, other = (
        load(f"objective: {{name: two-views}}\ndata: {{views: {{{', '.join(views[name] for name in order)}}}}}")
        for order in ("ab", "ba")
    )
    assert differences(one, one) == []
    assert differences(one, other) == ['data.views: "a, b" there, "b, a" here']


def test_an_objective_that_looks_across_the_batch_takes_no_smaller_micro_batch(two_views):
    two = f"objective: {{name: two-views}}\n{VIEWS}"
    assert load(two, "train.batch=8", "train.micro_batch=8").train.micro_batch == 8
    found = refusal(two, "train.batch=8", "train.micro_batch=4")
    assert (
        "train.micro_batch (4) must be train.batch (8): objective.name two-views looks across the whole batch" in found
    )


def test_activation_checkpointing_needs_blocks():
    found = refusal("train: {activation_checkpointing: true}", whole=RESNET)
    assert found.endswith("train.activation_checkpointing needs blocks (model.name vit), and model.name is resnet")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("{mixer: pol}", "model.mixer must be of attention, mlp, pool, conv, identity, got 'pol'"),
        ("{mixer: pool}", "model.pool cls needs attention in some block; mixer pool passes it nothing"),
        ("{mixer: [pool, conv], pool: avg, registers: 2}", "registers needs attention in some block; mixer pool/conv"),
        (
            "{mixer: mlp, pool: avg, positions: rope}",
            "positions rope work inside attention, and model.mixer is mlp",
        ),
        ("{mixer: []}", "model.mixer needs 1 to 12 names (model.depth), got 0"),
        ("{stem: conv, patch: 14, image: 28}", "model.stem conv needs a model.patch of 2, 4, 8, 16, ..., got 14"),
        ("{stem: conv, patch: 16, image: 32, width: 36, heads: 4}", "needs a model.width that 8 divides, got 36"),
        (
            "{stem: hybrid, patch: 8}",
            "stem hybrid with 3 stages has stride 16, of which model.patch must be a multiple",
        ),
        ("{stem: hybrid, stages: [2, 0]}", "model.stages must be 1 to 1000 each, got (2, 0)"),
        ("{pool: cls, class_token: false}", "model.pool cls needs model.class_token"),
        ("{registers: -1}", "model.registers must be 0 to 1000, got -1"),
        ("{layer_scale: 0.0}", "model.layer_scale must be above 0, got 0.0"),
        ("{positions: rope, width: 36, heads: 6}", "model.positions rope needs heads of a size that 4 divides, got 6"),
        (
            "{positions: rope_capi, registers: 2}",
            "rope_capi needs model.registers that 4 divides, got 2",
        ),
        ("{positions: learned2d, width: 33, heads: 3}", "model.positions learned2d needs a model.width that 2 divides"),
    ],
)
def test_parts_of_an_encoder_that_do_not_go_together_are_refused_by_name(model, expected):
    assert expected in refusal(f"model: {model}")


def test_a_single_mixer_needs_no_list():
    mixed = load_recipe("cifar10/mpp", ["model.mixer=conv"]).model
    assert mixed.mixer == ("conv",)
    assert (
        load_recipe("cifar10/mpp", ["model.mixer=[pool,attention]"]).model.mixers == ("pool",) * 2 + ("attention",) * 2
    )


def test_an_unknown_kind_of_encoder_is_refused_with_near_names():
    hint = "(your own: --import FILE.py, docs/extending.md)"
    assert refusal("model: {name: resnt}") == f'r.yaml: model.name: unknown "resnt". Did you mean: resnet? {hint}'


def test_patches_can_not_be_masked_without_patches():
    expected = "objective.name mpp needs an encoder of patches (model.name vit), got resnet"
    assert refusal("objective: {name: mpp}", whole=RESNET) == f"r.yaml: {expected}"
    assert refusal("", "objective.name=mpp", whole=RESNET) == f"command line: {expected}"


# Presets


def test_a_preset_gives_its_sizes():
    whole = WHOLE.replace("{image: 8, patch: 2, width: 8, heads: 2}", "{image: 32, preset: S/4}")
    assert load(whole=whole).model == replace(presets["S/4"], image=(32, 32))


def test_a_preset_replaces_sizes_below_it_and_yields_to_keys_beside_and_above_it():
    whole = WHOLE.replace(", patch: 2, width: 8, heads: 2", "")

    def sizes(below: str, above: str, *overrides: str) -> tuple[int, int, int]:
        model = load(f"model: {above}", *overrides, whole=f"{whole.partition('model')[0]}model: {below}").model
        return model.width, model.heads, model.patch

    preset, width = "{image: 32, preset: S/4}", "{image: 32, width: 96}"
    assert sizes(preset, width) == (96, 6, 4)
    assert sizes(width, preset) == (384, 6, 4)
    assert sizes("{image: 32}", "{preset: S/4, width: 96}") == (96, 6, 4)
    assert sizes(width, width, "model.preset=S/4") == (384, 6, 4)
    assert sizes(width, width, "model.preset=S/4", "model.heads=3") == (384, 3, 4)


def test_an_unknown_preset_is_refused_with_near_names():
    assert refusal("model: {preset: b/16}") == 'r.yaml: model.preset: unknown "b/16". Did you mean: B/16, S/16, L/16?'
    assert "unknown [1]. Expected one of: Ti/2, Ti/4" in refusal("", "model.preset=[1]")


# Refusals

REFUSED = {
    "model: {widht: 3}": "r.yaml: model.widht: unknown key. Did you mean: width?",
    "lr: 3": "r.yaml: lr: unknown key. Did you mean: train.lr?",
    "trian: {lr: 3}": "r.yaml: trian: unknown key. Did you mean: train?",
    "name: x": "r.yaml: name: unknown key. Did you mean: model.name?",
    "log: {zzz: 1}": "r.yaml: log.zzz: unknown key. Expected one of: every, pictures, tensorboard",
    "data: {augment: {flipp: 1}}": "r.yaml: data.augment.flipp: unknown key. Did you mean: flip?",
    "objective: {name: mmp}": 'r.yaml: objective.name: unknown "mmp". Did you mean: mpp?',
    "objective: {shares: 1}": "r.yaml: objective.shares: unknown key. Did you mean: share?",
    "model: {width: abc}": 'r.yaml: model.width: expected a whole number, found "abc"',
    "model: {width: 8.5}": "r.yaml: model.width: expected a whole number, found 8.5",
    "model: {width: true}": "r.yaml: model.width: expected a whole number, found true",
    "model: {width: '8'}": 'r.yaml: model.width: expected a whole number, found "8"',
    "model: {width: null}": "r.yaml: model.width: expected a whole number, found null",
    "model: {image: [8]}": "r.yaml: model.image: expected [a whole number, a whole number], found [8]",
    "model: {mean: 0.5}": "r.yaml: model.mean: expected [a number, ...], found 0.5",
    "model: {pool: max}": 'r.yaml: model.pool: expected one of cls, avg, avg_norm, cls_avg, map, found "max"',
    "model: 3": "r.yaml: model: expected a section of keys, found 3",
    "model:": "r.yaml: model: expected a section of keys, found null",
    "data: {path: 3}": "r.yaml: data.path: expected text, found 3",
    "data: {val: yes}": "r.yaml: data.val: expected text or null, found true",
    "train: {lr: '2e-4'}": 'r.yaml: train.lr: expected a number, found "2e-4"',
    "train: {lr: .nan}": "r.yaml: train.lr: expected a number, found NaN",
    "train: {steps: 1e3}": "r.yaml: train.steps: expected a whole number or null, found 1000.0",
    "train: {compile: 1}": "r.yaml: train.compile: expected true or false or null, found 1",
    "train: {micro_batch: atuo}": 'r.yaml: train.micro_batch: expected a whole number or auto, found "atuo"',
    "train: {batch: 99999999999999999999}": "r.yaml: train.batch: expected a whole number, found 99999999999999999999",
    "train: {clip: !!bool maybe}": "r.yaml: expected keys with values in YAML, found an error: 'maybe'",
    "train: {lr: 1, lr: 2}": "found duplicate key lr",
    "train: {lr: [1}": "r.yaml: expected keys with values in YAML, found an error: while parsing",
    "train: {steps: !!python/object/apply:os.system [ls]}": "found an error: could not determine a constructor",
    f"seed: {'9' * 5000}": "r.yaml: expected keys with values in YAML, found an error: ",
    "seed: -1": "r.yaml: seed must be in [0, 2 ** 63), got -1",
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_wrong_key_or_value_is_refused_in_one_line(text):
    assert REFUSED[text] in refusal(text)


TOGETHER = {
    "model.patch=3": "command line: model.image (8, 8) must be a multiple of model.patch (3)",
    "model.channels=2": "command line: objective.target mean_colour needs images in colour or grey (model.channels 3 "
    "or 1, got 2); pixels and normalised_pixels take any",
    "objective.target=[pixels, pixels]": "command line: objective.target must be one name or several different ones, "
    "got ['pixels', 'pixels']",
    "objective={target: colour_grid, grid: 3}": "command line: objective.grid (3) must divide model.patch (2)",
    "model.patch=8": "command line: masked patches need at least 2 patches, got an image (8, 8) of one patch",
    "objective.share=1.5": "command line: objective.share must be in (0, 1], got 1.5",
    "model.width=4_000_000_000_000": "command line: model.mlp must be 1 to 1000000, got 16000000000000",
    "train.warmup=11": "command line: train.warmup (11.0 steps) must not exceed train.steps (10)",
    "train.decay=0.1": "command line: train.decay (0.1) is of train.schedule wsd, and that is cosine",
    "train={schedule: wsd, decay: 1.5}": "command line: train.decay must be in [0, 1], a share of the run, got 1.5",
    "train={schedule: wsd, warmup: 9}": "command line: train.warmup (9 of 10 steps) and train.decay (0.2 of the run) "
    "must not exceed the run together",
    "train.steps=0": "command line: train.steps must be above 0, got 0",
    "train={steps: 3, epochs: 2}": "command line: exactly one of train.steps, train.epochs and train.images must be "
    "given, found train.steps (3) and train.epochs (2.0)",
    "train.steps=null": "command line: exactly one of train.steps, train.epochs and train.images must be given, found "
    "none",
}


@pytest.mark.parametrize("override", TOGETHER)
def test_what_does_not_go_together_is_refused_naming_whose_fault_it_is(override):
    assert refusal("", override).startswith(TOGETHER[override])
    section, _, rest = override.partition(".") if "={" not in override else override.partition("=")
    text = f"{section}: {rest if rest.startswith('{') else '{' + rest.replace('=', ': ') + '}'}"
    assert refusal(text).startswith(TOGETHER[override].replace("command line", "r.yaml"))


def test_what_is_missing_is_named():
    without_data, without_name = (
        WHOLE.replace(line, "") for line in ("data: {path: shards}", "objective: {name: mpp}")
    )
    assert refusal(whole=without_data) == "r.yaml: data.path: missing, and without a default"
    expected = f"r.yaml: objective.name: missing. Expected one of: {', '.join(OBJECTIVES)}"
    assert refusal(whole=without_name) == expected


@pytest.mark.parametrize("override", ["train.lr", "train.lr=", "=3", "", "train.lr= "])
def test_an_override_needs_a_key_and_a_value(override):
    assert refusal("", override) == f'command line: expected KEY=VALUE (null for none), found "{override}"'


def test_a_later_override_wins():
    recipe = load("", "train={lr: 1, batch: 8}", "train.lr=2", "train={batch: 4}")
    assert (recipe.train.lr, recipe.train.batch) == (2, 4)


def test_overrides_are_refused_like_files():
    assert refusal("", "model.widht=3") == "command line: model.widht: unknown key. Did you mean: width?"
    assert refusal("", "train.lr=fast") == 'command line: train.lr: expected a number, found "fast"'
    assert refusal("", "out=3") == "command line: out: expected text or null, found 3"
    assert refusal("", "base=whole.yaml").startswith("command line: base: unknown key.")


@pytest.mark.parametrize("text", ["- 1", "abc", "\x00", "[]", "3"])
def test_a_file_that_is_no_recipe_is_refused(text):
    write("r.yaml", text)
    with pytest.raises(RecipeError, match=r"^r\.yaml: [^\n]+$"):
        load_recipe("r.yaml")


def test_a_file_that_is_no_text_is_refused():
    Path("r.yaml").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(RecipeError, match=r"^r\.yaml: expected keys with values in YAML, found an error: [^\n]+$"):
        load_recipe("r.yaml")


def test_a_recipe_that_is_not_there_is_refused_with_near_names():
    with pytest.raises(RecipeError, match=r"^quickstrat: neither a recipe file nor .*\. Did you mean: quickstart\?$"):
        load_recipe("quickstrat")


HOSTILE = ["${oc.env:SECRET}", "a${oc.env:SECRET}b", "${data.val}", "${", "\\x24{oc.env:SECRET}"]


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize(
    "place", ['data: {path: "%s"}', 'base: "%s"', 'model: {mean: ["%s"]}', '"%s": 1', 'seed: {"%s": 1}']
)
def test_nothing_in_a_recipe_is_resolved(hostile, place, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    write("r.yaml", place % hostile)
    with pytest.raises(RecipeError, match=r"^r\.yaml: [^\n]+$") as caught:
        load_recipe("r.yaml")
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in refusal("", f'data.path="{hostile}"')


def test_a_few_lines_cannot_grow_without_bound():
    lines = [
        "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1]",
        *(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 8)}]" for i in range(9)),
    ]
    assert refusal("\n".join(lines)).startswith("r.yaml: expected keys with values in YAML, found an error: ")


def test_the_refusal_of_an_interpolation_names_its_key():
    expected = 'recipes are plain values and take no ${...}, found "${oc.env:HOME}"'
    assert refusal("data: {path: '${oc.env:HOME}'}") == f"r.yaml: data.path: {expected}"
    assert refusal("", "out=${oc.env:HOME}") == f"command line: out: {expected}"


def test_loading_neither_draws_nor_allocates():
    state = torch.get_rng_state()
    recipe = load("model: {width: 65536, depth: 12, heads: 8}")  # 2.5 TB of weights
    assert recipe.model.depth == 12
    assert torch.equal(torch.get_rng_state(), state)


# Durations


@pytest.mark.parametrize(
    ("duration", "images", "steps", "warmup"),
    [
        ("steps: 100, warmup: 10", 7, 100, 10),
        ("epochs: 3, warmup: 1", 100, 30, 10),
        ("epochs: 3, warmup: 1", 101, 31, 11),
        ("epochs: 0.1, warmup: 0.05", 5000, 50, 25),
        ("images: 1001, warmup: 95", 3, 101, 10),
        ("epochs: 0.001, warmup: 0", 5, 1, 0),
    ],
)
def test_durations_become_whole_steps(duration, images, steps, warmup):
    recipe = load(f"train: {{batch: 10, {duration}}}").in_steps(images)
    assert (recipe.train.steps, recipe.train.warmup) == (steps, warmup)
    assert (recipe.train.epochs, recipe.train.images) == (None, None)
    assert recipe.in_steps(images) == recipe


def test_a_layer_s_duration_takes_the_place_of_one_below():
    recipe = load("train: {epochs: 2, warmup: 1}", "train.images=50", "train.warmup=5")
    assert recipe.duration == ("images", 50)
    assert recipe.train.warmup == 5


def test_another_unit_needs_a_warm_up_in_that_unit():
    assert refusal("train: {epochs: 2, warmup: 1}", "train.steps=50") == (
        "command line: train.warmup: give it in steps as well; found 1 epochs, the recipe's"
    )
    assert load("train: {epochs: 2}", "train.steps=50").duration == ("steps", 50)  # no warm-up, no doubt


@pytest.mark.parametrize(
    ("duration", "images", "warmup"),
    [
        ("epochs: 20, warmup: 2", 15_000, 1500),
        ("steps: 100, warmup: 25", 4000, 1000),
        ("images: 10, warmup: 3", 1001, 300),
        ("epochs: 1, warmup: 0", 7, 0),
    ],
)
def test_a_length_in_images_keeps_the_warm_ups_share(duration, images, warmup):
    before = load(f"train: {{batch: 10, lr: 0.5, {duration}}}")
    recipe = before.lasting(images)
    assert recipe.duration == ("images", images)
    assert (recipe.train.steps, recipe.train.epochs, recipe.train.warmup) == (None, None, warmup)
    lengths = {"steps", "epochs", "images", "warmup"}
    changed = {line.split(":")[0] for line in differences(before, recipe)}
    assert changed <= {f"train.{name}" for name in lengths}
    assert recipe.in_steps(10**6).train.steps == math.ceil(images / 10), "whatever the number of images"


def test_an_empty_split_has_no_steps():
    with pytest.raises(ValueError, match=r"^data\.train \(train\) must hold at least 1 image, found 0$"):
        load("train: {epochs: 1}").in_steps(0)


# Saving and comparing


def test_a_saved_recipe_comes_back_equal():
    overrides = ["train.lr=1e-7", "train.clip=null", "model.mean=[0.1, 0.2, 0.3]", "data.path='1e3: #'", "out='null'"]
    recipe = load("", *overrides).in_steps(100)
    save_recipe(recipe, "saved.yaml")
    assert load_recipe("saved.yaml") == recipe
    assert differences(load_recipe("saved.yaml"), recipe) == []
    assert sorted(os.listdir()) == ["r.yaml", "saved.yaml", "whole.yaml"]


def test_the_run_folder_is_named_after_the_recipe_and_survives_saving():
    recipe = load_recipe("cifar10/mpp")
    assert (recipe.name, recipe.folder) == ("cifar10-mpp", Path("runs/cifar10-mpp"))
    save_recipe(recipe, "recipe.yaml")
    assert load_recipe("recipe.yaml").folder == recipe.folder
    assert load("").folder == Path("runs/r")
    assert load("out: here").folder == Path("here")
    assert load("out: null").folder == Path("runs/r")


def test_a_save_that_fails_leaves_the_old_file(monkeypatch):
    recipe = load("")
    save_recipe(recipe, "saved.yaml")
    monkeypatch.setattr("mpp.files.os.fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(UserError, match="No space"):
        save_recipe(load("seed: 5"), "saved.yaml")
    assert load_recipe("saved.yaml") == recipe
    assert not [name for name in os.listdir() if name.endswith(".part")]


def test_differences_name_keys_and_both_values():
    old, new = load("train: {lr: 1e-3}"), load("train: {lr: 2e-4}\ndata: {val: test}\nout: elsewhere")
    assert differences(old, new) == ['data.val: null there, "test" here', "train.lr: 0.001 there, 0.0002 here"]


def test_what_a_run_chose_agrees_with_auto():
    chosen, auto = load("train: {batch: 8, micro_batch: 4}"), load("train: {batch: 8}")
    assert differences(chosen, auto) == []
    assert differences(auto, chosen) == ['train.micro_batch: "auto" there, 4 here']


# Bundled recipes


def test_every_bundled_recipe_loads_and_tells_its_source_and_result():
    recipes = dict(list_recipes())
    assert {"quickstart", "cifar10/mpp", "cifar10/mpp_colour_grid", "cifar10/mpp_pixels"} <= set(recipes)
    kinds = {"finetune", "labels", "cnn", "compare"}
    assert {f"{folder}/{kind}" for folder in ("cifar10", "imagenet", "transfer32") for kind in kinds} <= set(recipes)
    assert {"imagenet/vit_b16_mpp", "paper/vit_b16_mpp", "paper/vit_b16_finetune", "digits/finetune"} <= set(recipes)
    for name, comment in recipes.items():
        assert load_recipe(name) == load_recipe(f"{name}.yaml")
        assert load_recipe(name).name == name.replace("/", "-")
        assert re.search(r"^Source: .*^Result: ", comment, re.DOTALL | re.MULTILINE), name


def test_mae_s_recipes_have_its_published_numbers():
    recipe, large = load_recipe("paper/vit_b16_mae"), load_recipe("paper/vit_l16_mae")
    train, objective, mean = recipe.train, recipe.objective, (0.485, 0.456, 0.406)
    assert (train.epochs, train.warmup, train.batch, train.min_lr, train.clip) == (1600, 40, 4096, 0, None)
    assert (train.optimizer, train.lr, train.weight_decay, train.betas) == (
        "adamw",
        1.5e-4 * 4096 / 256,
        0.05,
        (0.9, 0.95),
    )
    assert (objective.share, objective.normalised) == (0.75, True)
    assert (objective.decoder.width, objective.decoder.depth, objective.decoder.heads) == (512, 8, 16)
    assert objective.decoder.positions == recipe.model.positions == "sincos2d_mae"
    assert recipe.model == replace(presets["B/16"], positions="sincos2d_mae", mean=mean, std=(0.229, 0.224, 0.225))
    assert (recipe.data.augment.crop, recipe.data.augment.area, recipe.data.augment.flip) == (
        "inception",
        (0.2, 1),
        True,
    )
    assert (large.train, large.objective, large.data) == (train, objective, recipe.data)
    assert (large.model.width, large.model.depth, large.model.heads, large.model.mean) == (1024, 24, 16, mean)


def test_the_paper_s_recipe_has_the_paper_s_numbers():
    recipe = load_recipe("paper/vit_b16_mpp")
    train, objective = recipe.train, recipe.objective
    assert (train.steps, train.warmup, train.batch) == (1_000_000, 10_000, 4096)
    assert (train.optimizer, train.lr, train.weight_decay, train.betas) == ("adam", 2e-4, 0, (0.9, 0.999))
    assert (objective.target, objective.share, objective.split) == ("mean_colour", 0.5, (0.8, 0.1, 0.1))
    assert bits_of(objective.bits, recipe.model.channels) == 3
    assert recipe.model == replace(presets["B/16"], gelu="tanh")
    assert (recipe.data.augment.crop, recipe.data.augment.flip, recipe.model.image) == ("inception", True, (224, 224))
