"""The tables of RESULTS.md and the chart of docs/objectives.md, from what `benchmarks.objectives` measured.

python -m benchmarks.objectives_shown benchmarks/results/objectives-cifar10.json [--chart docs/objectives-time.svg]
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpp.eval.compare.summary import interval, mean_sd
from mpp.eval.report.charts import Line, line_chart

FIGURES = ("linear", "k-NN", "5-shot", "fine-tuned")
STYLE = Path(__file__).parent.parent / "eval" / "report" / "report.css"


def values_of(tests: Sequence[Mapping[str, float]], figure: str) -> list[float]:
    """One figure of each seed, in per cent."""
    return [100 * test[figure] for test in tests]


def mean(values: Sequence[float]) -> str:
    middle, sd = mean_sd(values)
    return f"{middle:.1f}" if sd is None else f"{middle:.1f} +- {sd:.1f}"


def difference(values: Sequence[float], others: Sequence[float]) -> str:
    """The mean paired difference with its 95 % interval."""
    pairs = [value - other for value, other in zip(values, others, strict=True)]
    low, high = interval(pairs)
    middle = mean_sd(pairs)[0]
    return f"{middle:+.1f}" if low is None or high is None else f"{middle:+.1f} ({low:+.1f} to {high:+.1f})"


def rows(table: Sequence[Sequence[str]]) -> list[str]:
    """Markdown of a table, its heads first."""
    head, *body = table
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body)]


def every(found: Mapping[str, Any]) -> list[str]:
    """The table of all objectives, n = 1, the best by the held-out score first."""
    lines, speed = found["lines"], found.get("speed", {})
    table = [["", "rate", "held out", *FIGURES, "images/s", "MiB"]]
    for name, line in sorted(lines.items(), key=lambda pair: -pair[1]["held out"]):
        figures = [mean(values_of(line["test"], figure)) for figure in FIGURES]
        measured = speed.get(name, {"images/s": float("nan"), "peak MiB": float("nan")})
        cost = [f"{measured['images/s']:.0f}", f"{measured['peak MiB']:.0f}"]
        table.append([line["title"], f"{line['rate']:g}", f"{100 * line['held out']:.1f}", *figures, *cost])
    untrained = next(iter(lines.values()))["untrained"]
    table.append(
        ["Untrained, from scratch", "", "", *(mean(values_of(untrained, figure)) for figure in FIGURES), "", ""]
    )
    return rows(table)


def seeds(found: Mapping[str, Any]) -> list[str]:
    """The best two, n = 3, and what they gain over their own untrained encoders."""
    table = [["", *FIGURES]]
    for name, best in found["seeds"].items():
        figures = [(values_of(best["test"], figure), values_of(best["untrained"], figure)) for figure in FIGURES]
        table.append([found["lines"][name]["title"], *(f"{mean(own)}; {difference(own, old)}" for own, old in figures)])
    return rows(table)


def times(found: Mapping[str, Any]) -> list[str]:
    """What each reaches in a time, n = 3."""
    table = [["", "seconds", "images", *FIGURES]]
    for reached in found["times"].values():
        figures = [mean(values_of(reached["test"], figure)) for figure in FIGURES]
        table.append([reached["title"], f"{reached['seconds']:g}", f"{reached['images']:,}", *figures])
    return rows(table)


def chart(found: Mapping[str, Any]) -> str:
    """An SVG of what each form reaches in a time: linear probe, with standard deviations."""
    points: dict[str, list[tuple[float, list[float]]]] = {}
    for reached in found["times"].values():
        points.setdefault(reached["title"], []).append((reached["seconds"], values_of(reached["test"], "linear")))
    lines = [
        Line(
            title,
            look,
            [(seconds, mean_sd(values)[0]) for seconds, values in sorted(reached)],
            spread=[mean_sd(values)[1] for _, values in sorted(reached)],
            marks="all",
        )
        for look, (title, reached) in enumerate(points.items())
        if len(reached) > 1
    ]
    seconds = sorted({place for line in lines for place, _ in line.points})
    drawn = line_chart(
        "time",
        "Linear probe against time",
        "Top-1 accuracy of a linear probe after pretraining for a time, mean and standard deviation of three seeds",
        lines,
        size=(760, 340),
        x_title="seconds of pretraining on one thread",
        y_title="linear probe, top-1 in per cent",
        x_ticks=[(place, f"{place:g}") for place in seconds],
        labels=True,
    )
    return drawn.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(
        "</title>", f"</title><style>{STYLE.read_text()}</style>", 1
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--chart", type=Path)
    options = parser.parse_args()
    found = json.loads(options.results.read_bytes())
    for part, show in {"lines": every, "seeds": seeds, "times": times}.items():
        if found.get(part):
            print("\n".join(show(found)), end="\n\n")
    if options.chart and found.get("times"):
        options.chart.write_text(chart(found))


if __name__ == "__main__":
    main()
