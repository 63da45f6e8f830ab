"""mpp/shards/labels.py: labels from any place, and what numbers they get."""

import json
from pathlib import Path

import pytest
from shard_files import labelled, png, quiet, write_tar

from mpp.cli import main
from mpp.shards.build import index_folder
from mpp.shards.index import Index, read_index
from mpp.shards.labels import labeller
from mpp.shards.tar import ShardError


def folder_of(folder: Path, samples: dict[str, dict[str, object]]) -> Path:
    """A folder with one shard: {key: {ending: content}}, where content that is no bytes becomes JSON."""
    members = []
    for i, (key, others) in enumerate(samples.items()):
        texts = {ending: c if isinstance(c, bytes) else json.dumps(c).encode() for ending, c in others.items()}
        members += [(f"{key}.png", png(i)), *((f"{key}.{ending}", text) for ending, text in texts.items())]
    folder.mkdir(exist_ok=True)
    write_tar(folder / "t-0.tar", members)
    return folder


def found(index: Index) -> list[str | None]:
    """The class of each image."""
    return [None if label < 0 else index.classes[label] for label in index.label]


def refused(folder: Path, labels: str | None = None) -> str:
    with pytest.raises(ShardError) as caught:
        index_folder(folder, labels=labels, report=quiet)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_integers_stay_and_names_are_numbered_alike_in_every_split(tmp_path):
    (tmp_path / "numbers").mkdir()
    write_tar(tmp_path / "numbers/a-0.tar", labelled(5, ["0", "2"]))
    write_tar(tmp_path / "numbers/b-0.tar", labelled(3, ["02"]))
    first, second = index_folder(tmp_path / "numbers", report=quiet)
    assert first.classes == second.classes == ("0", "1", "2")
    assert set(second.label) == {2}
    (tmp_path / "names").mkdir()
    write_tar(tmp_path / "names/a-0.tar", labelled(3, ["cat", "dog", "ant"]))
    write_tar(tmp_path / "names/b-0.tar", labelled(2, ["dog"]))
    first, second = index_folder(tmp_path / "names", report=quiet)
    assert first.classes == second.classes == ("ant", "cat", "dog")
    assert first.label.tolist() == [1, 2, 0]
    assert second.label.tolist() == [2, 2]


def test_a_field_of_the_json_member_is_a_label(tmp_path):
    facts = [{"a": {"b": "cat"}}, {"a": {"b": "dog "}}, {"a": {"b": None}}, {"a": 3}, {}, [1], b"no json", {"a.b": "x"}]
    lines: list[str] = []
    folder = folder_of(tmp_path, {str(i): {"json": fact, "cls": b"9"} for i, fact in enumerate(facts)})
    (index,) = index_folder(folder, labels="json:a.b", report=lines.append)
    assert found(index) == ["cat", "dog"] + [None] * 6
    assert "t: 6 images have no label (json:a.b)" in lines


def test_numbers_true_and_false_of_json_are_labels_and_other_values_are_refused(tmp_path):
    numbers = [3, "1", 2.0, float("nan"), -1]  # pandas writes whole numbers beside missing ones as 2.0 and NaN
    (index,) = index_folder(
        folder_of(tmp_path, {str(i): {"json": {"y": v}} for i, v in enumerate(numbers)}), None, "json:y", quiet
    )
    assert index.label.tolist() == [3, 1, 2, -1, -1]
    (index,) = index_folder(
        folder_of(tmp_path, {str(i): {"json": {"y": v}} for i, v in enumerate([True, False])}), None, "json:y", quiet
    )
    assert found(index) == ["true", "false"]
    assert index.label.tolist() == [1, 0]
    for value, kind in ((0.5, "0.5"), ([1], "a list"), ({"z": 1}, "an object"), (float("inf"), "inf")):
        said = refused(folder_of(tmp_path, {"k": {"json": {"y": value}}}), "json:y")
        assert f"t-0.tar: key k: its y is {kind}; a label is a whole number or a text" in said


def test_the_name_is_the_last_folder_or_what_stands_before_the_last_underscore(tmp_path):
    keys = ["n01440764_10026", "a/b/x_1", "a_b_7", "./n02_1", "../cat_9", "plain", "/x_y"]
    (index,) = index_folder(folder_of(tmp_path, {key: {} for key in keys}), labels="name", report=quiet)
    assert found(index) == ["n01440764", "b", "a_b", "n02", "cat", None, "x"]


def test_the_first_group_of_a_regular_expression_is_a_label(tmp_path):
    folder = folder_of(tmp_path, {key: {} for key in ("7-cat/1", "8-dog/2", "other/3")})
    lines: list[str] = []
    (index,) = index_folder(folder, labels=r"name:^\d+-(\w+)/", report=lines.append)
    assert found(index) == ["cat", "dog", None]
    assert any(line.startswith("t: 1 images have no label") for line in lines)
    (index,) = index_folder(folder, labels=r"name:^(\d)?", report=quiet)
    assert index.label.tolist() == [7, 8, -1]


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("name:(", "no regular expression"), ("name:" + "(" * 5000, "no regular expression"),
        ("name:a+", "has no group"), ("json:", "expected cls, json:FIELD"), ("name:", "expected cls"),
        ("folder", "expected cls"), ("json:absent", "gives none of 2 images a label"), ("name", "gives none of 2"),
    ],
)  # fmt: skip
def test_a_choice_that_makes_no_sense_is_refused(tmp_path, choice, words):
    assert words in refused(folder_of(tmp_path, {"a": {"json": {"b": 1}}, "c": {}}), choice)


def test_none_gives_no_labels_and_a_choice_stays_until_there_is_another(tmp_path):
    folder = folder_of(tmp_path, {"cat_1": {"cls": b"0"}, "dog_1": {"cls": b"1"}})
    assert index_folder(folder, report=quiet)[0].labels == "cls"
    index_folder(folder, labels="name", report=quiet)
    lines: list[str] = []
    index_folder(folder, report=lines.append)
    assert found(read_index(folder, "t")) == ["cat", "dog"]
    assert "labels: name, as in the index that was there" in lines
    (index,) = index_folder(folder, labels="none", report=quiet)
    assert (index.classes, set(index.label)) == ((), {-1})
    assert index_folder(folder, labels="cls", report=quiet)[0].label.tolist() == [0, 1]


def cls(folder: Path, texts: list[str]) -> Path:
    return folder_of(folder, {f"{i:04d}": {"cls": text.encode()} for i, text in enumerate(texts)})


def test_numbers_are_never_given_new_meanings_for_a_few_odd_labels(tmp_path):
    said = refused(cls(tmp_path, ["10", "9", "9", "cat?", "1"]))
    assert "4 images have a whole number for a label and 1 have not, such as cat? (t-0.tar, key 0003)" in said
    assert "mend them, or use other --labels than cls, such as none" in said
    assert "such as 7 (t-0.tar, key 0002)" in refused(cls(tmp_path, ["a", "a", "7", "a"]))  # one class of each kind
    assert "whole number" in refused(cls(tmp_path, ["1"] * 9 + ["x", "y"]))  # most classes are names, not most images
    assert "whole number" in refused(cls(tmp_path, ["x"] * 9 + ["1", "2"]))  # and the other way round


def test_a_few_names_may_be_digits_and_that_is_said(tmp_path):
    lines: list[str] = []
    (index,) = index_folder(cls(tmp_path, ["rock", "2", "paper", "rock"]), report=lines.append)
    assert found(index) == ["rock", "2", "paper", "rock"]
    assert index.classes == ("2", "paper", "rock")
    assert "labels: 1 of 3 classes have whole numbers for names, such as 2; all are numbered in the order" in lines[0]


def test_class_names_in_json_are_kept_where_all_images_agree_and_other_json_does_no_harm(tmp_path):
    facts = [{"class": "cat"}, [1], b"not json", {"class": 5}, {"class": "x" * 300}, b"[" * 100_000]
    samples = {str(i): {"cls": b"%d" % i, "json": fact} for i, fact in enumerate(facts)}
    samples |= {"a": {"cls": b"6", "json": {"class": "one"}}, "b": {"cls": b"6", "json": {"class": "other"}}}
    (index,) = index_folder(folder_of(tmp_path, samples), report=quiet)
    assert index.classes == ("cat", "1", "2", "3", "4", "5", "6")


@pytest.mark.parametrize("digits", ["1234567", "9" * 6000])
def test_integers_too_large_for_classes_are_refused(tmp_path, digits):
    write_tar(tmp_path / "t-0.tar", labelled(2, [digits]))
    with pytest.raises(ShardError, match="no class"):
        index_folder(tmp_path, report=quiet)


def test_captions_are_no_classes(tmp_path):
    said = refused(folder_of(tmp_path, {"k": {"cls": b"a long caption " * 10**6}}))
    assert "t-0.tar: key k: its label has " in said
    names = cls(tmp_path, [f"{i}" + "x" * 200 for i in range(30)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mpp.shards.labels.NAMES_BYTES", 5000)
        assert "30 different labels with names of 6050 bytes" in refused(names)


def test_labels_that_are_no_text_stay_different_and_can_be_stored_and_printed(tmp_path):
    samples = {"a": b"\xff", "b": b"\xfe", "c": b"x\0y", "d": "ä".encode("latin-1"), "e": "ä".encode()}
    index_folder(folder_of(tmp_path, {key: {"cls": text} for key, text in samples.items()}), report=quiet)
    assert found(read_index(tmp_path, "t")) == ["\\xff", "\\xfe", "x\0y", "\\xe4", "ä"]
    index_folder(folder_of(tmp_path, {"k": {"json": b'{"y": "\\ud800"}'}}), labels="json:y", report=quiet)
    assert found(read_index(tmp_path, "t")) == ["\\ud800"]
    assert labeller("name")("\udcff/1", lambda ending: b"") == ("\\udcff", "")


def test_the_command_takes_the_choice(tmp_path, capsys):
    folder = folder_of(tmp_path, {"cat_1": {}, "dog_1": {}, "plain": {}})
    main(["shards", "index", str(folder), "--labels", "name"])
    assert "t: 1 images have no label (name)" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["shards", "index", str(folder), "--labels", "name:("])
    assert capsys.readouterr().err.splitlines()[-1].startswith("mpp: --labels name:(: no regular expression: ")
