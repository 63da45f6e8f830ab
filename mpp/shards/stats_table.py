"""The figures of mpp/shards/stats.py as text for a terminal."""

from collections.abc import Sequence

from mpp.errors import counted, shown
from mpp.shards.classes import displayed
from mpp.shards.duplicates import Copy, Duplicates
from mpp.shards.stats import SplitStats, Spread, Stats

FEW = 20  # classes that are all listed
ENDS = 5  # of more classes, so many smallest and largest
PAIRS = 5  # groups of duplicates that are shown
CHANNELS = {1: ("grey",), 3: ("red", "green", "blue")}
MIB = 2**20


def table(stats: Stats) -> str:
    """Splits, classes and duplicates, each a part of its own."""
    parts = [_split(name, split) for name, split in stats.splits.items()]
    return "\n\n".join("\n".join(lines) for lines in [*parts, _classes(stats), _duplicates(stats)])


def _split(name: str, split: SplitStats) -> list[str]:
    lines = [
        f"{shown(name)}: {split.images} images in {counted(split.shards, 'shard')}, {split.bytes / MIB:.1f} MiB, "
        f"{split.damaged} damaged",
        f"{'':16}" + "".join(f"{head:>10}" for head in ("min", "5 %", "median", "95 %", "max")),
        _row("height, pixels", split.height),
        _row("width, pixels", split.width),
        _row("width / height", split.aspect, 3),
        _row("bytes an image", split.bytes_per_image),
    ]
    over = f"a sample of {split.decoded}" if split.sampled else f"all {split.decoded} good"
    if not split.mean:
        return [*lines, "no image could be decoded"]
    formats = ", ".join(f"{count} {kind}" for kind, count in split.formats.items())
    heads = "".join(f"{head:>10}" for head in CHANNELS[len(split.mean)])
    return [
        *lines,
        f"over {over} images, each of equal weight, in [0, 1] ({formats}):",
        f"{'colour':16}{heads}",
        f"{'mean':16}" + "".join(f"{value:10.4f}" for value in split.mean),
        f"{'std':16}" + "".join(f"{value:10.4f}" for value in split.std),
    ]


def _row(name: str, spread: Spread | None, digits: int = 0) -> str:
    if spread is None:
        return f"{name:16}{'-':>10}"
    values = (spread.min, spread.p5, spread.median, spread.p95, spread.max)
    return f"{name:16}" + "".join(f"{value:10.{digits}f}" for value in values)


def _classes(stats: Stats) -> list[str]:
    if not stats.classes:
        return ["no labels"]
    names, splits = displayed(stats.classes), stats.splits
    present = [label for label in range(len(names)) if any(split.images_by_label[label] for split in splits.values())]
    lines = [f"{len(present)} classes"]
    if len(present) <= FEW:
        wide = max(len(names[label]) for label in present) if present else 0
        wide = max(wide, len("without label"))
        columns = {shown(name): max(9, len(shown(name)) + 2) for name in splits}
        lines[0] = f"{lines[0]:{wide}}" + "".join(f"{name:>{column}}" for name, column in columns.items())
        rows = [(names[label], [split.images_by_label[label] for split in splits.values()]) for label in present]
        rows.append(("without label", [split.without_label for split in splits.values()]))
        for name, counts in rows:
            cells = zip(counts, columns.values(), strict=True)
            lines.append(f"{name:{wide}}" + "".join(f"{count:{column}}" for count, column in cells))
    else:
        for name, split in splits.items():
            lines += _ends(shown(name), split, names)
    for name, split in splits.items():
        lacking = [names[label] for label in present if not split.images_by_label[label]]
        if lacking and any(split.images_by_label):
            lines.append(f"{shown(name)} lacks {len(lacking)} of the classes: {_some(lacking)}")
    return lines


def _ends(name: str, split: SplitStats, names: Sequence[str]) -> list[str]:
    """Of many classes how many images they have, and which have the fewest and the most."""
    ranked = sorted((count, label) for label, count in enumerate(split.images_by_label) if count)
    if not ranked:
        return [f"{name}: no labels"]
    counts = [count for count, _ in ranked]
    median = counts[len(counts) // 2]
    few = ", ".join(f"{names[label]} {count}" for count, label in ranked[:ENDS])
    many = ", ".join(f"{names[label]} {count}" for count, label in reversed(ranked[-ENDS:]))
    return [
        f"{name}: {len(ranked)} classes with images: {counts[0]} to {counts[-1]}, median {median}; "
        f"{split.without_label} images without a label",
        f"  fewest: {few}",
        f"  most: {many}",
    ]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:ENDS]) + ", ..." * (len(names) > ENDS)


def _duplicates(stats: Stats) -> list[str]:
    found = stats.duplicates
    if not found.groups:
        return ["exact duplicates: none"]
    lines = [f"exact duplicates: {found.groups} groups of images with the same bytes"]
    for a, b, images in found.between:
        loud = "LEAK: " if a == "train" else ""
        lines.append(f"{loud}{images} of {stats.splits[b].images} images of {shown(b)} are in {shown(a)} as well")
    lines += [f"{shown(name)} holds {extra} images more than once" for name, extra in found.within.items() if extra]
    if found.disagreeing:
        lines.append(f"in {found.disagreeing} groups the labels disagree")
    return [*lines, *_listed(found)]


def _listed(found: Duplicates) -> list[str]:
    lines = ["  " + " = ".join(map(_copy, group[:ENDS])) + " = ..." * (len(group) > ENDS) for group in found.listed]
    left = found.groups - PAIRS
    return lines[:PAIRS] + (
        [f"  and {left} more (--json FILE lists the first {len(found.listed)})"] if left > 0 else []
    )


def _copy(copy: Copy) -> str:
    label = "" if copy.label is None else f" ({shown(copy.label)})"
    return f"{shown(copy.split)} {shown(copy.key)}{label}"
