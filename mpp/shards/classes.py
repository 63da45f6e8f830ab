"""Classes meet by name: whatever number an index, a file or a model gives a class, another may give it another.

Names are texts and nothing else: two that differ in any character are two classes. Those that look alike all the same,
such as a composed and a decomposed é, are shown escaped wherever both could be meant.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from mpp.errors import counted, shown
from mpp.shards.index import NO_INDEX, SUFFIX, Index, loaded, splits
from mpp.shards.tar import ShardError

NAMED = 3  # of several in a message
LISTED = 30  # of which what fits in 60 letters stands in a message
UNSEEN = ("Cc", "Cf", "Zl", "Zp")  # kinds of characters that leave no mark on a page


def translation(theirs: Sequence[str], ours: Sequence[str]) -> np.ndarray:
    """Our number (len(theirs) + 1,) of each of their classes, by name; -1 where there is none, and last for their -1.

    A name that occurs twice, as "crane" in ImageNet, says which class it is only where both lists are equal.
    """
    if tuple(theirs) == tuple(ours):
        return np.array([*range(len(ours)), -1], np.int64)
    often = Counter(ours) + Counter(name for name, times in Counter(theirs).items() if times > 1)
    known = {name: number for number, name in enumerate(ours) if often[name] == 1}
    return np.array([*(known.get(name, -1) for name in theirs), -1], np.int64)


def relabelled(index: Index, classes: Sequence[str], wrong: str = "") -> Index:
    """An index whose labels are numbered as `classes`, by name.

    wrong: what its classes and these are, to begin the message with. Raises ShardError for images of a class that is
    none of them.
    """
    if index.classes == tuple(classes):
        return index
    numbers = translation(index.classes, classes)
    present = np.unique(index.label[index.label >= 0])
    if unknown := [index.classes[label] for label in present[numbers[present] < 0].tolist()]:
        found = f"has images of class {listed(unknown)}"
        expected = f"expected {counted(len(classes), 'class', 'classes')} ({first_names(classes)})"
        words = f"{wrong}; it {found}" if wrong else f"{index.origin}: split {shown(index.split)} {found}, {expected}"
        raise ShardError(words + remark(unknown, classes))
    return replace(index, classes=tuple(classes), label=numbers[index.label].astype(np.int32))


def lacking(train: Index, test: Index) -> list[str]:
    """Names of the classes that images of `test` have and none of `train` has."""
    present = np.unique(test.label[test.label >= 0])
    known = np.isin(translation(test.classes, train.classes)[present], np.unique(train.label[train.label >= 0]))
    return [test.classes[label] for label in present[~known].tolist()]


def union(lists: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The classes of several lists: those of the first, then what others add."""
    first, known = tuple(lists[0]), set(lists[0])
    return (*first, *dict.fromkeys(name for names in lists[1:] for name in names if name not in known))


def of_folder(folder: Path) -> tuple[str, ...]:
    """The classes of all splits that have a whole index in a folder: those of train, then what others add by name.

    Whether the tars are there as well is no matter.
    """
    found = []
    for split in sorted(splits(folder), key=lambda split: (split != "train", split)):
        with suppress(*NO_INDEX):
            found.append(loaded(folder / (split + SUFFIX), split).classes)
    return union(found) if found else ()


def remark(unknown: Sequence[str], classes: Sequence[str]) -> str:
    """Why a class may be taken for one of others and is not: to end a message with, or nothing."""
    twins = {look(name): name for name in classes}
    if (twin := next((name for name in unknown if twins.get(look(name), name) != name), None)) is not None:
        return f" ({twin!a} only looks like {twins[look(twin)]!a})"
    doubled = {name for name, times in Counter(classes).items() if times > 1}.intersection(unknown)
    return f" ({shown(min(doubled))} is the name of several)" if doubled else ""


def first_names(classes: Sequence[str]) -> str:
    """As many of the names as fit in 60 letters."""
    return shown(", ".join(classes[:LISTED])[:60])


def listed(names: Sequence[str]) -> str:
    """Some of the names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(map(shown, names[:NAMED])) + more if names else "none"


def look(name: str) -> str:
    """What a reader sees of a name: equal for names that can't be told apart on a page."""
    seen = "".join(char for char in unicodedata.normalize("NFC", name) if unicodedata.category(char) not in UNSEEN)
    return " ".join(seen.split())


def look_alikes(names: Iterable[str]) -> list[list[str]]:
    """Groups of different names that look alike."""
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        groups.setdefault(look(name), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def look_alikes_line(names: Iterable[str]) -> str | None:
    """One line that names classes that look alike, if there are any."""
    groups = look_alikes(names)
    if not groups:
        return None
    some = "; ".join(" and ".join(map(ascii, group[:NAMED])) for group in groups[:NAMED])
    return f"labels: {len(groups)} groups of classes look alike and are not the same: {some}"


def displayed(names: Sequence[str]) -> list[str]:
    """Each name as it can be shown on one line: escaped where it can't be printed, or where others look like it."""
    alike = {name for group in look_alikes(names) for name in group}
    return [ascii(name) if name in alike or name != name.strip() or not look(name) else shown(name) for name in names]
