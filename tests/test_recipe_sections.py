"""Sections that are not part of a run."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from recipe_files import WHOLE, load, write

from mpp.recipe import RecipeError, load_recipe, load_section

pytestmark = pytest.mark.usefixtures("inside_tmp")


@dataclass(frozen=True)
class Arm:
    title: str = "none"
    lr: float = 1.0


@dataclass(frozen=True)
class Comparison:
    arms: dict[str, Arm]
    seeds: tuple[int, ...] = (0,)
    baseline: str | None = None


COMPARE = "compare: {arms: {a: {title: A}, b: {lr: 2}}, seeds: [1, 2]}\n"


def section(text: str, *overrides: str, base: str = COMPARE) -> dict:
    write("whole.yaml", WHOLE + base)
    write("deep/r.yaml", f"base: ../whole.yaml\n{text}")
    name, folder, values, source = load_section("deep/r.yaml", "compare", Comparison, overrides)
    assert (name, folder, source) == ("r", Path("deep").resolve(), "deep/r.yaml")
    return values


def section_refusal(text: str, *overrides: str, base: str = COMPARE) -> str:
    with pytest.raises(RecipeError) as caught:
        section(text, *overrides, base=base)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_section_is_read_through_its_bases_and_the_command_line():
    both = {"a": {"title": "A"}, "b": {"lr": 2}}
    assert section("") == {"arms": both, "seeds": [1, 2]}
    assert section("compare: {seeds: [3]}") == {"arms": both, "seeds": [3]}
    more = {"a": {"title": "A", "lr": 3}, "b": {"lr": 0.5}, "c": {}}
    assert section("compare: {arms: {a: {lr: 3}, c: {}}}", "compare.arms.b.lr=0.5") == {"arms": more, "seeds": [1, 2]}
    assert section("", "compare.baseline=a")["baseline"] == "a"


def test_null_leaves_an_arm_of_a_base_out():
    assert section("compare: {arms: {b: null}}")["arms"] == {"a": {"title": "A"}, "b": None}
    assert section("", "compare.arms.a=null")["arms"] == {"a": None, "b": {"lr": 2}}


SECTION_REFUSED = {
    "compare: {seds: [1]}": "deep/r.yaml: compare.seds: unknown key. Did you mean: seeds?",
    "compare: {arms: {a: {titel: A}}}": "deep/r.yaml: compare.arms.a.titel: unknown key. Did you mean: title?",
    "compare: {seeds: 3}": "deep/r.yaml: compare.seeds: expected [a whole number, ...], found 3",
    "compare: {seeds: [1.5]}": "deep/r.yaml: compare.seeds: expected [a whole number, ...], found [1.5]",
    "compare: {arms: {a: {lr: fast}}}": 'deep/r.yaml: compare.arms.a.lr: expected a number, found "fast"',
    "compare: {arms: {a: 3}}": "deep/r.yaml: compare.arms.a: expected a section of keys, found 3",
    "compare: {arms: [a]}": 'deep/r.yaml: compare.arms: expected a section of keys, found ["a"]',
    "compare: 3": "deep/r.yaml: compare: expected a section of keys, found 3",
    "compare:": "deep/r.yaml: compare: expected a section of keys, found null",
}


@pytest.mark.parametrize("text", SECTION_REFUSED)
def test_a_wrong_key_or_value_of_a_section_is_refused_in_one_line(text):
    assert section_refusal(text) == SECTION_REFUSED[text]


def test_an_error_in_a_section_names_its_layer():
    expected = "whole.yaml: compare.seds: unknown key. Did you mean: seeds?"
    assert section_refusal("", base="compare: {seds: [1]}") == expected
    expected = "command line: compare.arms.a.titel: unknown key. Did you mean: title?"
    assert section_refusal("", "compare.arms.a.titel=A") == expected


def test_a_section_that_is_not_there_is_named():
    found = section_refusal("", base="")
    assert found == "deep/r.yaml: compare: missing; this recipe has nothing to compare"


def test_a_comparison_does_not_disturb_the_run_of_its_recipe():
    plain = load("train: {lr: 0.5}")
    write("r.yaml", f"base: whole.yaml\ntrain: {{lr: 0.5}}\n{COMPARE}")
    assert load_recipe("r.yaml") == plain
    write("whole.yaml", WHOLE + COMPARE)
    assert load_recipe("r.yaml") == plain
    with pytest.raises(RecipeError, match=r"^command line: compare: unknown key\. "):
        load_recipe("r.yaml", ["compare.seeds=[1]"])
