"""From the figures of single runs to what they show: means, intervals, and plain sentences."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from scipy.stats import t as student

from .arms import FINETUNE, ArmConfig

CONFIDENCE = 0.95


class Figure(NamedTuple):
    """One figure of one chain."""

    arm: str
    seed: int
    protocol: str
    fraction: float
    metric: str
    value: float


def mean_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and the standard deviation of a sample (n - 1), None of a single value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def interval(differences: Sequence[float]) -> tuple[float | None, float | None]:
    """The 95 % interval of the mean of paired differences (Student's t); none of a single one."""
    mean, sd = mean_sd(differences)
    if sd is None:
        return None, None
    half = student.ppf(0.5 + CONFIDENCE / 2, len(differences) - 1) * sd / math.sqrt(len(differences))
    return mean - half, mean + half


def summarise(rows: Sequence[Figure], baseline: str) -> list[dict[str, Any]]:
    """Mean, standard deviation and n of each arm's figures, and their differences to the baseline, paired by seed."""
    groups: dict[tuple[str, str, float, str], dict[int, float]] = {}
    for row in rows:
        groups.setdefault((row.arm, row.protocol, row.fraction, row.metric), {})[row.seed] = row.value
    found = []
    for (arm, protocol, fraction, metric), values in groups.items():
        mean, sd = mean_sd(list(values.values()))
        entry = {"arm": arm, "protocol": protocol, "fraction": fraction, "metric": metric}
        other = groups.get((baseline, protocol, fraction, metric), {}) if arm != baseline else {}
        found.append(
            {**entry, "n": len(values), "mean": mean, "sd": sd, "difference": _difference(values, other, baseline)}
        )
    return found


def _difference(values: dict[int, float], other: dict[int, float], baseline: str) -> dict[str, Any] | None:
    pairs = [values[seed] - other[seed] for seed in values if seed in other]
    if not pairs:
        return None
    low, high = interval(pairs)
    return {"to": baseline, "n": len(pairs), "mean": mean_sd(pairs)[0], "low": low, "high": high}


def conclusions(rows: Sequence[Figure], titles: dict[str, str], arms: dict[str, ArmConfig], baseline: str) -> list[str]:
    """What follows from fine-tuning's top-1 accuracy, and what does not."""
    top1 = [row for row in rows if row.metric == "top1" and row.protocol == FINETUNE]
    found = []
    for arm, settings in arms.items():
        bound = " (an upper bound: it has seen all labels)" if settings.upper_bound else ""
        if arm != baseline:
            found.append((f"{titles[arm]}{bound} against “{titles[baseline]}”", _clauses(top1, arm, baseline)))
    for arm, settings in arms.items():
        if settings.total_of:
            pair = f"{titles[settings.total_of]} against “{titles[arm]}”, which sees as many images in all"
            found.append((pair, _clauses(top1, settings.total_of, arm)))
    sentences = [f"{pair}: {'; '.join(clauses)}." for pair, clauses in found if clauses]
    if sentences and len({row.seed for row in top1}) == 1:
        sentences.append("A single seed has no interval, and nothing follows from it.")
    if sentences:
        sentences.append(
            "Not shown: that the same holds for other images, larger encoders, longer training or settings not tried. "
            "An interval that includes 0 shows no difference; it does not show that there is none."
        )
    return sentences


def _clauses(rows: Sequence[Figure], arm: str, other: str) -> list[str]:
    """Each fraction's difference between two arms, paired by seed, in points, and whether it is one."""
    values = {(row.arm, row.fraction, row.seed): row.value for row in rows}
    clauses = []
    for fraction in sorted({row.fraction for row in rows}):
        here = {seed: value for (name, share, seed), value in values.items() if (name, share) == (arm, fraction)}
        pairs = [
            100 * (here[seed] - values[other, fraction, seed]) for seed in here if (other, fraction, seed) in values
        ]
        if pairs:
            clauses.append(f"with {shown(fraction)} {_verdict(pairs)}")
    return clauses


def _verdict(points: Sequence[float]) -> str:
    mean, (low, high) = mean_sd(points)[0], interval(points)
    if low is None or high is None:
        return f"{mean:+.1f} points (one seed)"
    kind = "no difference shown" if low <= 0 <= high else "better" if low > 0 else "worse"
    return f"{kind}, {mean:+.1f} points (95 % interval {low:+.1f} to {high:+.1f}, n = {len(points)})"


def shown(fraction: float) -> str:
    """A label fraction for people."""
    return "all labels" if fraction == 1 else f"{100 * fraction:g} % of the labels"


def table(results: dict[str, Any]) -> str:
    """The main figures for a terminal: accuracy in per cent, mean and standard deviation, by protocol and fraction."""
    headlines = {FINETUNE: "top1", **{one["name"]: one["headline"] for one in results["protocols"]}}
    main = [entry for entry in results["summary"] if entry["metric"] == headlines[entry["protocol"]]]
    found = {(entry["protocol"], entry["fraction"]) for entry in main}
    columns = sorted(found, key=lambda column: (list(headlines).index(column[0]), column[1]))
    cells = {(entry["arm"], entry["protocol"], entry["fraction"]): _cell(entry) for entry in main}
    own = {one["name"]: one["headline"] for one in results["protocols"] if one["draws_labels"]}
    heads = [f"{protocol}, {own.get(protocol) or shown(fraction)}" for protocol, fraction in columns]
    lines = [["", *heads]]
    for arm in results["arms"]:
        lines.append([arm["title"], *(cells.get((arm["name"], *column), "") for column in columns)])
    wide = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = ["  ".join(f"{text:<{width}}" for text, width in zip(line, wide, strict=True)).rstrip() for line in lines]
    problems = [f"failed: {failure['run']}: {failure['error']}" for failure in results["failures"]]
    return "\n".join([*rows, "", *results["conclusions"], *_left_out(results), *problems])


def _left_out(results: dict[str, Any]) -> list[str]:
    """A line for each protocol without the figure by which it is compared."""
    lines = []
    for name, headline in ((one["name"], one["headline"]) for one in results["protocols"]):
        given = dict.fromkeys(entry["metric"] for entry in results["summary"] if entry["protocol"] == name)
        if headline not in given:
            lines.append(f"{name}: no figure {headline}, by which it is compared; it gave {', '.join(given) or 'none'}")
    return lines


def _cell(entry: dict[str, Any]) -> str:
    spread = "" if entry["sd"] is None else f" +- {100 * entry['sd']:.1f}"
    return f"{100 * entry['mean']:.1f}{spread} (n = {entry['n']})"
