"""Where the labels of shards come from, `mpp shards index --labels`, and what numbers they get.

A choice is cls (the member of that name), json:FIELD, name, name:REGEX or none. It gives each image a text or nothing;
whole numbers stay as they are, names are numbered in sorted order.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from mpp import budget
from mpp.errors import cause, shown
from mpp.shards.classes import look_alikes_line
from mpp.shards.tar import Labeller, Scan, ShardError

EXPECTED = "expected cls, json:FIELD, name, name:REGEX or none"
CLASS_DIGITS = 6  # longer whole numbers are identifiers, not classes
LONGEST = 256  # characters of a label; longer texts are captions, not classes
NAMES_BYTES = 2**24  # of all class names: the index holds them in its header
NUMBER = re.compile("[0-9]+")
WITHOUT = frozenset(["", "-1"])  # no label, as a text


class Classes(NamedTuple):
    """What the labels of a folder mean."""

    choice: str
    names: tuple[str, ...]  # by label
    numbers: dict[str, int]  # the label of each text that was found


def labeller(choice: str) -> Labeller:
    """How a sample's label is found; ShardError if there is no such choice."""
    kind, _, detail = choice.partition(":")
    if choice == "cls":
        return _of_cls
    if choice == "none":
        return lambda key, content: ("", "")
    if choice == "name":
        return _of_name
    if kind == "json" and detail:
        return partial(_of_json, detail.split("."))
    if kind == "name" and detail:
        return partial(_of_pattern, _compiled(detail))
    raise ShardError(f"--labels {shown(choice)}: {EXPECTED}")


def is_pattern(choice: str) -> bool:
    """Whether a choice holds a regular expression."""
    return choice.startswith("name:")


def _of_cls(key: str, content: Callable[[str], bytes]) -> tuple[str, str]:
    """The text of `cls`, and "class" of the json member, with which our own shards name it."""
    facts = _facts(content("json"))
    name = facts.get("class") if isinstance(facts, dict) else None
    name = _whole(name) if isinstance(name, str) and len(name) <= LONGEST else ""
    return _clean(content("cls").decode("utf-8", "backslashreplace")), name


def _of_json(path: Sequence[str], key: str, content: Callable[[str], bytes]) -> tuple[str, str]:
    value = _facts(content("json"))
    for field in path:
        value = value.get(field) if isinstance(value, dict) else None
    if value is None or (isinstance(value, float) and math.isnan(value)):  # pandas writes a missing value as NaN
        return "", ""
    if isinstance(value, bool):
        return str(value).lower(), ""  # as JSON spells it; false becomes 0 and true 1
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas again: whole numbers beside missing ones
    if not isinstance(value, int | str):
        kind = "an object" if isinstance(value, dict) else "a list" if isinstance(value, list) else value
        raise ValueError(f"its {shown('.'.join(path))} is {kind}; a label is a whole number or a text")
    return _clean(str(value)), ""


def _of_name(key: str, content: Callable[[str], bytes]) -> tuple[str, str]:
    """The last folder of the key, or what stands before the last underscore, as in ImageNet's n01440764_10026."""
    *folders, base = key.split("/")
    last = folders[-1] if folders and folders[-1] not in ("", ".", "..") else ""
    return _clean(last or base.rpartition("_")[0]), ""


def _of_pattern(pattern: re.Pattern[str], key: str, content: Callable[[str], bytes]) -> tuple[str, str]:
    found = pattern.search(key)
    return _clean(found[1] or "") if found else "", ""


def _compiled(text: str) -> re.Pattern[str]:
    try:
        pattern = re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ShardError(f"--labels name:{shown(text)}: no regular expression: {cause(error)}") from None
    if not pattern.groups:
        raise ShardError(f"--labels name:{shown(text)}: has no group; put the class in (), as in name:^(.*)_")
    return pattern


def _facts(data: bytes) -> Any:
    """What a json member holds; None where that is no JSON, for img2dataset and others may put anything there."""
    try:
        return budget.json_of(data or b"null")
    except ValueError:
        return None


def _clean(text: str) -> str:
    """A label as a text that can be printed and stored anywhere; different labels stay different."""
    text = _whole(text.strip())
    if len(text) > LONGEST:
        raise ValueError(f"its label has {len(text)} characters, more than {LONGEST}: no class; use another --labels")
    return text


def _whole(text: str) -> str:
    """The same text but for halves of characters, which no file can hold."""
    return text.encode("utf-8", "backslashreplace").decode()


def classes_of(scans: Sequence[Scan], choice: str, report: Callable[[str], None]) -> Classes:
    """The classes of all scanned shards: whole numbers stay, names are numbered in sorted order.

    Where both occur, names must be the most, of the classes and of the images: else someone's numbers would be given
    new meanings because of a few odd labels, and ShardError says which.
    """
    counts = Counter(sample.label for scan in scans for sample in scan.samples)
    for text in WITHOUT:
        del counts[text]
    numbers = {text: counts[text] for text in counts if NUMBER.fullmatch(text)}
    if not counts and choice not in ("cls", "none"):
        raise ShardError(f"--labels {shown(choice)}: gives none of {sum(len(s.samples) for s in scans)} images a label")
    if alike := look_alikes_line(counts):
        report(alike)
    if not numbers:
        return _named(choice, sorted(counts))
    if len(numbers) == len(counts):
        return _numbered(scans, choice, list(numbers))
    numeric, total = sum(numbers.values()), counts.total()
    if 2 * len(numbers) >= len(counts) or 2 * numeric >= total:
        raise ShardError(_both(scans, choice, numbers, numeric, total - numeric))
    which = f"{len(numbers)} of {len(counts)} classes have whole numbers for names, such as {next(iter(numbers))}"
    report(f"labels: {which}; all are numbered in the order of their names")
    return _named(choice, sorted(counts))


def _both(scans: Sequence[Scan], choice: str, numbers: dict[str, int], numeric: int, others: int) -> str:
    """The error about labels of both kinds, with an example of the rarer kind."""
    scan, sample = next(
        (scan, sample)
        for scan in scans
        for sample in scan.samples
        if sample.label not in WITHOUT and (sample.label in numbers) == (numeric < others)
    )
    example = f"{shown(sample.label)} ({shown(scan.path.name)}, key {shown(sample.key)})"
    found = f"{numeric} images have a whole number for a label and {others} have not, such as {example}"
    return f"{scan.path.parent}: {found}; mend them, or use other --labels than {shown(choice)}, such as none"


def _named(choice: str, names: list[str]) -> Classes:
    if (size := sum(len(name.encode()) for name in names)) > NAMES_BYTES:
        words = f"--labels {shown(choice)}: {len(names)} different labels with names of {size} bytes"
        raise ShardError(f"{words}; expected classes, with at most {NAMES_BYTES} bytes")
    return Classes(choice, tuple(names), {name: label for label, name in enumerate(names)})


def _numbered(scans: Sequence[Scan], choice: str, texts: list[str]) -> Classes:
    """Classes for labels that are whole numbers, with the names on which all their images agree."""
    if long := [text for text in texts if len(text.lstrip("0")) > CLASS_DIGITS]:
        words = f"--labels {shown(choice)}: found {long[0][:20]}"
        raise ShardError(f"{words}; whole numbers of more than {CLASS_DIGITS} digits are no classes")
    numbers = {text: int(text) for text in texts}
    names: dict[int, set[str]] = {}
    for text, name in {(sample.label, sample.name) for scan in scans for sample in scan.samples}:
        if name and text in numbers:
            names.setdefault(numbers[text], set()).add(name)
    agreed = {label: found.pop() for label, found in names.items() if len(found) == 1}
    return Classes(choice, tuple(agreed.get(label, str(label)) for label in range(max(numbers.values()) + 1)), numbers)
