"""The report's tables. Each figure carries the exact value it shows (data-value), so that tests can compare it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from .charts import swatch

Results = Mapping[str, Any]  # what compare.py writes to results.json
Key = tuple[str, str, float, str]  # arm, protocol, fraction, metric

NONE = '<span class="none">–</span>'
NONE_CELL = f"<td>{NONE}</td>"
CHOSEN = ' class="chosen"'
UPPER_BOUND = "†"
TOTAL_BUDGET = "‡"


@dataclass(frozen=True)
class Unit:
    """How a metric is shown."""

    scale: float = 100.0
    digits: int = 2
    better: int = 1  # -1 where less is better

    def __call__(self, value: float, *, signed: bool = False) -> str:
        return number(self.scale * value, self.digits, signed=signed)


SHARE = Unit()  # accuracies, in %
UNITS = {"ece": Unit(better=-1), "loss": Unit(scale=1.0, digits=3, better=-1)}


def number(value: float, digits: int, *, signed: bool = False) -> str:
    """With a true minus sign, and none before a zero."""
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "−")


def share(fraction: float) -> str:
    return f"{100 * fraction:.4g}\u00a0%"


def count(value: float) -> str:
    for unit, name in ((1e9, "billion"), (1e6, "million")):
        if value >= unit:
            return f"{value / unit:.3g}\u00a0{name}"
    return f"{value:,.0f}"


def flops(value: float) -> str:
    for unit, name in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")):
        if value >= unit:
            return f"{value / unit:.3g}\u00a0{name}FLOP"
    return f"{value / 1e6:.3g}\u00a0MFLOP"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.3g}\u00a0s"
    if seconds < 5400:
        return f"{seconds / 60:.0f}\u00a0min"
    minutes = round(seconds / 60)
    return f"{minutes // 60}\u00a0h\u00a0{minutes % 60:02d}\u00a0min"


def attributes(**names: Any) -> str:
    """data-NAME="value" for each that is not None; floats exactly."""
    parts = [f' data-{name}="{escape(str(value))}"' for name, value in names.items() if value is not None]
    return "".join(parts)


def figure(stat: str, value: float, text: str) -> str:
    return f"<span{attributes(stat=stat, value=repr(value))}>{text}</span>"


def index(results: Results) -> dict[Key, Mapping[str, Any]]:
    return {(row["arm"], row["protocol"], row["fraction"], row["metric"]): row for row in results["summary"]}


def looks(results: Results) -> dict[str, int]:
    """Which colour and marker each arm has, in all charts and tables; the baseline is neutral."""
    others = [arm["name"] for arm in results["arms"] if arm["name"] != results["baseline"]]
    return {results["baseline"]: -1} | {name: look for look, name in enumerate(others)}


def titles(results: Results) -> dict[str, str]:
    """Each arm's title with its marks, as plain text."""
    return {arm["name"]: " ".join([arm["title"], *marks(arm)]) for arm in results["arms"]}


def marks(arm: Mapping[str, Any]) -> list[str]:
    return [UPPER_BOUND] * bool(arm["upper_bound"]) + [TOTAL_BUDGET] * bool(arm["total_budget"])


def dash(arm: Mapping[str, Any]) -> str:
    """Arms that are no fair competitors have broken lines."""
    return "7 4" if arm["upper_bound"] else "2 3" if arm["total_budget"] else ""


def arm_head(results: Results, arm: Mapping[str, Any]) -> str:
    """The head of an arm's row, with its sign in the charts."""
    sign = "".join(f'<abbr class="mark">{mark}</abbr>' for mark in marks(arm))
    base = ' <small class="tag">baseline</small>' if arm["name"] == results["baseline"] else ""
    look = looks(results)[arm["name"]]
    return f'<th scope="row">{swatch(look, dash(arm))}<span>{escape(arm["title"])}{sign}{base}</span></th>'


def difference(row: Mapping[str, Any] | None, unit: Unit) -> str:
    """In the unit of the metric, with its interval; a sign in front where the interval excludes zero."""
    found = row["difference"] if row else None
    if not found:
        return ""
    mean = figure("difference", found["mean"], unit(found["mean"], signed=True))
    if found["low"] is None:
        return f'<span class="difference">{mean} <small>no interval</small></span>'
    low, high = (figure(end, found[end], unit(found[end], signed=True)) for end in ("low", "high"))
    side = 1 if found["low"] > 0 else -1 if found["high"] < 0 else 0
    sign = {1: "▲ ", -1: "▼ ", 0: ""}[side]
    kind = {1: " better", -1: " worse", 0: ""}[side * unit.better]
    return f'<span class="difference{kind}">{sign}{mean} <small>[{low}, {high}]</small></span>'


def score(row: Mapping[str, Any], unit: Unit) -> str:
    """Mean, standard deviation and the number of seeds."""
    mean = f"<b>{figure('mean', row['mean'], unit(row['mean']))}</b>"
    sd = f" ± {figure('sd', row['sd'], unit(row['sd']))}" if row["sd"] is not None else ""
    return f'<span class="score">{mean}{sd} <small>n\u00a0=\u00a0{figure("n", row["n"], str(row["n"]))}</small></span>'


@dataclass(frozen=True)
class Column:
    fraction: float
    metric: str
    head: str
    below: str = ""


def score_table(results: Results, caption: str, protocol: str, columns: Sequence[Column]) -> str:
    """Arms by columns: mean ± standard deviation (n), and the difference to the baseline with its interval."""
    found = index(results)
    head = "".join(
        f'<th scope="col">{escape(column.head)}<small>{escape(column.below)}</small></th>' for column in columns
    )
    rows = []
    for arm in results["arms"]:
        cells, any_found = [], False
        for column in columns:
            row = found.get((arm["name"], protocol, column.fraction, column.metric))
            unit = UNITS.get(column.metric, SHARE)
            keys = {"arm": arm["name"], "protocol": protocol, "fraction": column.fraction, "metric": column.metric}
            value = attributes(**keys, value=repr(row["mean"]) if row else None)
            cells.append(f"<td{value}>{score(row, unit) + difference(row, unit) if row else NONE}</td>")
            any_found |= row is not None
        if any_found or protocol == "finetune":
            rows.append(f"<tr>{arm_head(results, arm)}{''.join(cells)}</tr>")
    return boxed(caption, f'<th scope="col">Arm</th>{head}', [rows])


def boxed(caption: str, head: str, groups: Sequence[Sequence[str]], kind: str = "scores") -> str:
    """A table that scrolls sideways in a box of its own where the page is too narrow."""
    bodies = "".join(f"<tbody>{''.join(rows)}</tbody>" for rows in groups)
    return (
        f'<div class="box" tabindex="0" role="region" aria-label="{escape(caption)}"><table class="{kind}">'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>{bodies}</table></div>"
    )


def heads(*names: str) -> str:
    return "".join(f'<th scope="col">{name}</th>' for name in names)


def arms_table(results: Results) -> str:
    rows = []
    for arm in results["arms"]:
        begins = f"weights of the recipe {arm['pretrain']}" if arm["pretrain"] else "random weights"
        rows.append(
            f'<tr>{arm_head(results, arm)}<td class="long">{escape(begins)}</td>'
            f'<td class="long">{escape(str(arm["encoder"]))}</td>'
            f"<td>{count(arm['parameters']) if arm['parameters'] is not None else NONE}</td></tr>"
        )
    head = heads("Arm", "Begins with", "Encoder", "Parameters")
    return boxed("The arms of this comparison", head, [rows], "words")


@dataclass(frozen=True)
class Cost:
    """What an arm took at a fraction, pretraining included: means over seeds; None where it was not measured."""

    pretraining: float  # images seen
    labelled: float
    flops: float | None
    seconds: float | None


def cost(results: Results, arm: str, fraction: float) -> Cost | None:
    runs = [run for run in results["costs"] if run["arm"] == arm and run["fraction"] in (fraction, None)]
    seeds = {run["seed"] for run in runs if run["fraction"] is not None}
    if not seeds:
        return None
    runs = [run for run in runs if run["seed"] in seeds]

    def mean(name: str, stages: Sequence[bool] = (True, False)) -> float | None:
        values = [run[name] for run in runs if (run["stage"] == "pretrain") in stages]
        return None if None in values else sum(values) / len(seeds)

    pretraining, labelled = (mean("images", [stage]) or 0.0 for stage in (True, False))
    return Cost(pretraining, labelled, mean("flops"), mean("seconds"))


def cost_table(results: Results, fractions: Sequence[float]) -> str:
    found, groups = index(results), []
    for fraction in fractions:
        base = cost(results, results["baseline"], fraction)
        rows = []
        for arm in results["arms"]:
            taken = cost(results, arm["name"], fraction)
            if taken:
                row = found.get((arm["name"], "finetune", fraction, "top1"))
                rows.append(_cost_row(results, arm, fraction, taken, base, difference(row, SHARE)))
        if rows:
            heading = f'<th class="group" colspan="7" scope="rowgroup">{share(fraction)} of the labels</th>'
            groups.append([f"<tr>{heading}</tr>", *rows])
    names = ("Images, pretraining", "Images, with labels", "Computation", "× baseline", "Time", "Top-1 gain, points")
    caption = "What each arm took, pretraining included (means over seeds), beside what it gained"
    return boxed(caption, heads("Arm", *names), groups) if groups else ""


def _times(value: float) -> str:
    return f"{value:,.0f}×" if value >= 100 else f"{value:.3g}×"


def _cost_row(results: Results, arm: Any, fraction: float, taken: Cost, base: Cost | None, gain: str) -> str:
    def cell(metric: str, value: float | None, text: str) -> str:
        keys = {"arm": arm["name"], "fraction": fraction, "metric": metric}
        return NONE_CELL if value is None else f"<td{attributes(**keys, value=repr(value))}>{text}</td>"

    times = taken.flops / base.flops if taken.flops is not None and base and base.flops else None
    return (
        f"<tr>{arm_head(results, arm)}{cell('pretraining', taken.pretraining, count(taken.pretraining))}"
        f"{cell('labelled', taken.labelled, count(taken.labelled))}"
        f"{cell('flops', taken.flops, flops(taken.flops or 0))}{cell('times', times, _times(times or 0))}"
        f"{cell('seconds', taken.seconds, duration(taken.seconds or 0))}<td>{gain or NONE}</td></tr>"
    )


def rates_table(results: Results) -> str:
    """The learning rates that were tried, each with the accuracy on the held-out images, and the one chosen."""
    rows = []
    known = {arm["name"]: arm for arm in results["arms"]}
    for chosen in results["chosen"]:
        tried = "".join(
            f"<li{CHOSEN * (one['lr'] == chosen['lr'])}>{one['lr']:g}: {SHARE(one['accuracy'])}\u00a0%</li>"
            for one in chosen["tried"]
        )
        value = attributes(arm=chosen["arm"], fraction=chosen["fraction"], metric="lr", value=repr(chosen["lr"]))
        rows.append(
            f"<tr>{arm_head(results, known[chosen['arm']])}<td>{share(chosen['fraction'])}</td>"
            f'<td{value}>{chosen["lr"]:g}</td><td class="long"><ul class="tried">{tried}</ul></td>'
            f"<td>{chosen['images_held_out']:,}</td></tr>"
        )
    names = ("Arm", "Labels", "Chosen", "Tried, with the accuracy on held-out images", "Images held out")
    return boxed("Learning rates", heads(*names), [rows], "words") if rows else ""
