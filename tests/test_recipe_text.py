import json
import time
import tracemalloc

import pytest
import yaml
from odd_names import ODD

from mpp.recipe.text import NO_YAML, read_yaml, write_yaml


def bomb(first: str, again: str, levels: int) -> str:
    lines = [f"a0: &a0 {first}"]
    for level in range(levels):
        lines.append(f"a{level + 1}: &a{level + 1} {again.replace('IT', f'*a{level}')}")
    return "\n".join(lines)


BOMBS = {
    "lists": bomb("[1, 1, 1, 1, 1, 1, 1, 1]", "[IT, IT, IT, IT, IT, IT, IT, IT]", 9),
    "sections": bomb("{x: 1}", "{a: IT, b: IT, c: IT, d: IT, e: IT}", 12),
    "merge keys": bomb("{x: 1}", "{<<: [IT, IT, IT, IT, IT, IT, IT, IT, IT]}", 12),
    "keys": bomb("[1, 1]", "{? [IT, IT, IT, IT, IT, IT, IT, IT] : 1}", 9),
    "just too many": "a: &a [" + "1, " * 5000 + "1]\nb: [*a, *a, *a, *a, *a]",
    "itself": "a: &a [*a]",
    "itself further down": "a: &a {b: {c: [*a]}}",
    "deep": "[" * 400,
    "deeper": "[" * 200_000,
    "deep sections": "\n".join(" " * i + "a:" for i in range(300)),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_what_stands_for_more_than_it_says_is_refused_at_once(kind):
    tracemalloc.start()
    before = time.process_time()
    with pytest.raises(NO_YAML):
        read_yaml(BOMBS[kind])
    assert time.process_time() - before < 5
    assert tracemalloc.get_traced_memory()[1] < 100 * 2**20
    tracemalloc.stop()


def test_an_alias_stands_for_a_value_of_its_own():
    values = read_yaml("a: &a {x: [1, 2]}\nb: *a\nc: {<<: *a, y: 3}\nd: [*a, *a]")
    assert values == {"a": {"x": [1, 2]}, "b": {"x": [1, 2]}, "c": {"x": [1, 2], "y": 3}, "d": [{"x": [1, 2]}] * 2}
    values["b"]["x"].append(3)
    assert values["a"] == values["d"][0] == values["d"][1] == {"x": [1, 2]}


def test_any_number_of_values_may_be_written_out():
    names = [f"n{i:08d}" for i in range(20_000)]
    assert read_yaml(write_yaml({"classes": names, "weights": [0.1] * 20_000})) == {
        "classes": names,
        "weights": [0.1] * 20_000,
    }
    assert read_yaml(json.dumps(names)) == names


@pytest.mark.parametrize("name", ODD)
def test_a_text_comes_back_as_it_was(name):
    values = {"a": name, "names": [name, name], name: 1, "sections": {name: {name: name}}}
    text = write_yaml(values)
    assert read_yaml(text) == values
    # PyYAML's own loader, which reads 1e3 as a text, for texts that both read alike
    assert yaml.safe_load(text)["a"] == name


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("-2E+4", -2e4), ("1_000", 1000), (".5", 0.5), ("-.5e1", -5.0), ("1.", 1.0), ("yes", True),
        ("null", None), ("", None), ("2020-01-01", "2020-01-01"), ("1e", "1e"), ("e3", "e3"), ("'1e3'", "1e3"),
    ],
)  # fmt: skip
def test_numbers_and_texts_are_told_apart(text, value):
    found = read_yaml(f"a: {text}")["a"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("value", [1e-05, 1.5e300, 5e-324, 0.1, -0.0, 12345678901234567.0, 1e22, 2**62, -1, True, None])
def test_numbers_come_back_as_they_were(value):
    found = read_yaml(write_yaml({"a": value}))["a"]
    assert (repr(found), type(found)) == (repr(value), type(value))


@pytest.mark.parametrize("text", ["{a: 1, a: 2}", "a: 1\nb: 2\na: 1", "{a: 1, 'a': 2}"])
def test_a_key_given_twice_is_refused(text):
    with pytest.raises(NO_YAML, match="found duplicate key a"):
        read_yaml(text)


@pytest.mark.parametrize(
    "text", ["!!python/object/apply:os.system [ls]", "!!python/name:os.system ''", "!mine 1", "a: !!bool a", "a: [1}"]
)
def test_no_tag_is_obeyed(text):
    with pytest.raises(NO_YAML):
        read_yaml(text)
