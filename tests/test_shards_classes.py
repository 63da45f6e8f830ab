import numpy as np
import pytest
from odd_names import LOOK_ALIKE, ODD
from shard_files import labelled, quiet, write_tar

from mpp.shards.build import index_folder
from mpp.shards.classes import displayed, look_alikes, look_alikes_line, relabelled, remark, translation, union
from mpp.shards.index import read_index
from mpp.shards.tar import ShardError


def slow(theirs, ours):
    """By name, where that is one class on both sides; equal lists mean the same."""
    if list(theirs) == list(ours):
        return [*range(len(ours)), -1]
    one = [name for name in ours if list(ours).count(name) == 1 and list(theirs).count(name) == 1]
    return [list(ours).index(name) if name in one else -1 for name in theirs] + [-1]


LISTS = [
    (["a", "b"], ["a", "b"]), (["b", "a"], ["a", "b"]), (["b"], ["a", "b"]), (["a", "b", "c"], ["c", "a"]), ([], ["a"]),
    (["a"], []), (["crane", "dog", "crane"], ["crane", "dog", "crane"]), (["dog", "crane"], ["crane", "dog", "crane"]),
    (["crane", "crane", "dog"], ["crane", "dog"]), (ODD, ODD[::-1]), (ODD[3:], ODD), (LOOK_ALIKE[:1], LOOK_ALIKE[1:]),
]  # fmt: skip


@pytest.mark.parametrize(("theirs", "ours"), LISTS)
def test_classes_are_matched_by_name(theirs, ours):
    assert translation(theirs, ours).tolist() == slow(theirs, ours)


def test_a_hundred_thousand_classes_are_matched():
    names = [f"n{i:08d}" for i in range(100_000)]
    assert np.array_equal(translation(names[::-1], names)[:-1], np.arange(100_000)[::-1])


@pytest.fixture
def index(tmp_path):
    write_tar(tmp_path / "train-0.tar", [*labelled(6, ["b", "d", "b"]), ("9.png", labelled(1, [""])[0][1])])
    index_folder(tmp_path, report=quiet)
    return read_index(tmp_path, "train")


def test_labels_get_the_numbers_of_other_classes_and_none_stays_none(index):
    assert index.label.tolist() == [0, 1, 0, 0, 1, 0, -1]
    found = relabelled(index, ("d", "e", "b"))
    assert (found.classes, found.label.tolist()) == (("d", "e", "b"), [2, 0, 2, 2, 0, 2, -1])
    assert found.label.dtype == np.int32
    assert relabelled(relabelled(found, ("b", "d")), index.classes).label.tolist() == index.label.tolist()


def test_an_image_of_another_class_is_refused_and_a_class_without_images_is_not(index):
    with pytest.raises(ShardError, match=r": split train has images of class d, expected 2 classes \(b, c\)$"):
        relabelled(index, ("b", "c"))
    assert relabelled(index.select(np.array([0, 2])), ("b", "c")).label.tolist() == [0, 0]
    with pytest.raises(ShardError, match=r"^these and those; it has images of class b \(b is the name of several\)$"):
        relabelled(index, ("b", "d", "b"), "these and those")


def test_names_that_look_alike_are_told_apart_where_both_could_be_meant():
    groups = [["café", "cafe\u0301"], ["a b", "a  b", " a b", "a\u200b b"]]
    assert look_alikes([*groups[0], "x", *groups[1]]) == groups
    assert look_alikes(["a", "A", "b", "1", "l"]) == []
    assert displayed(["x", *groups[0], " y", "", "z\n"]) == ["x", "'caf\\xe9'", "'cafe\\u0301'", "' y'", "''", "'z\\n'"]
    assert len(set(displayed(ODD))) == len(ODD)
    assert all(name.isprintable() for name in displayed(ODD))
    assert look_alikes_line(["a", "b"]) is None
    assert "'caf\\xe9' and 'cafe\\u0301'" in look_alikes_line(groups[0])
    assert remark(["cafe\u0301"], ["café", "x"]) == " ('cafe\\u0301' only looks like 'caf\\xe9')"
    assert remark(["y"], ["café", "x"]) == ""


def test_an_index_says_which_of_its_classes_look_alike(tmp_path):
    write_tar(tmp_path / "train-0.tar", labelled(4, [*LOOK_ALIKE, "x"]))
    lines: list[str] = []
    [index] = index_folder(tmp_path, report=lines.append)
    assert sorted(index.classes) == sorted([*LOOK_ALIKE, "x"])
    assert any("look alike" in line and "'cafe\\u0301'" in line for line in lines)


def test_a_union_keeps_the_first_list_as_it_is():
    assert union([["b", "a", "b"], ["a", "c"], ["c", "d"]]) == ("b", "a", "b", "c", "d")
    assert union([["b", "b"], ["b", "b"]]) == ("b", "b")
