"""The report's charts and pictures: which numbers of the results go into which chart of charts.py."""

import base64
import binascii
import struct
from collections.abc import Mapping, Sequence
from html import escape
from math import inf
from statistics import fmean, stdev
from typing import Any, Literal

from mpp.objectives.config import NEIGHBOURS
from mpp.shards.classes import displayed

from .charts import MOST_LABELS, Bar, Line, Point, bar_rows, finite, legend, line_chart, plain, powers
from .tables import (
    SHARE,
    Results,
    attributes,
    dash,
    difference,
    figure,
    index,
    looks,
    score,
    share,
    titles,
)

MOST_CLASSES = 30  # in a chart; of more, half of these from each end
PICTURE_WIDTH = 800  # pixels that pictures are enlarged to, at most
UNEQUAL = 4  # times, that the longest line is longer than the shortest for a logarithmic axis
WIDE, NARROW, SMALL = (860, 430), (350, 320), (340, 240)  # sizes of charts in pixels

DASHES = ("7 4", "2 3", "9 3 2 3", "1 4")  # of what is reached without learning, in turn
SHARES = "%"  # the panel that everything in per cent shares
LOSS = {"title": "Loss", "share": False, "guess": False}


def unlabelled(results: Results) -> list[Mapping[str, Any]]:
    """The arms this is about: pretrained, and not on labels that the others never see."""
    return [arm for arm in results["arms"] if arm["pretrain"] and not arm["upper_bound"]]


def gain_chart(results: Results, fractions: Sequence[float]) -> str:
    """Each arm's difference to the baseline with its interval; empty without any."""
    found, look, name = index(results), looks(results), titles(results)
    groups = []
    for fraction in fractions:
        bars = []
        for arm in results["arms"]:
            row = found.get((arm["name"], "finetune", fraction, "top1"))
            gain = row["difference"] if row else None
            if gain:
                low, high = (None if gain[end] is None else 100 * gain[end] for end in ("low", "high"))
                keys = attributes(arm=arm["name"], protocol="finetune", fraction=fraction, metric="top1")
                words = difference(row, SHARE)
                bars.append(Bar(name[arm["name"]], 100 * gain["mean"], low, high, words, look[arm["name"]], keys))
        if bars:
            groups.append((f"{share(fraction)} of the labels", bars))
    caption = (
        f"Top-1 accuracy after fine-tuning: difference to “{name[results['baseline']]}” in percentage points, with its "
        "95 % interval"
    )
    return bar_rows(caption, ("Arm", "Points"), groups, solid=False) if groups else ""


def fraction_chart(results: Results, fractions: Sequence[float]) -> str:
    """Accuracy against the label fraction, one line an arm; for a single fraction a bar an arm."""
    found, look, name = index(results), looks(results), titles(results)
    lines, bars = [], []
    for arm in results["arms"]:
        keys = [(arm["name"], "finetune", fraction, "top1") for fraction in fractions]
        rows = [found[key] for key in keys if key in found]
        dots = [
            (row["fraction"], 100 * row["value"])
            for row in results["rows"]
            if (row["arm"], row["protocol"], row["metric"]) == (arm["name"], "finetune", "top1")
        ]
        spread = [None if row["sd"] is None else 100 * row["sd"] for row in rows]
        points = [(row["fraction"], 100 * row["mean"]) for row in rows]
        lines.append(Line(name[arm["name"]], look[arm["name"]], points, spread, (), dots, dash(arm), "all"))
        for row, (_, mean), sd in zip(rows, points, spread, strict=True):
            low, high = (None, None) if sd is None else (mean - sd, mean + sd)
            bars.append(Bar(name[arm["name"]], mean, low, high, score(row, SHARE), look[arm["name"]]))
    if len(fractions) == 1:
        return bar_rows("Top-1 accuracy in %, whiskers: standard deviation", ("Arm", "%"), [("", bars)], solid=True)
    return _fraction_figure(lines, [(fraction, share(fraction)) for fraction in fractions])


def _fraction_figure(lines: Sequence[Line], marked: Sequence[tuple[float, str]]) -> str:
    """The chart twice, of which the style sheet shows one: its letters would be too small where it is scaled down."""
    title = "Accuracy against the share of labels"
    text = "Top-1 accuracy after fine-tuning for each arm and share of labels; the table above has the same numbers."
    parts = []
    for kind, size in (("wide", WIDE), ("narrow", NARROW)):
        labels = kind == "wide" and len(lines) <= MOST_LABELS
        chart = line_chart(
            f"fractions-{kind}",
            title,
            text,
            lines,
            size=size,
            x_title="share of the labels",
            y_title="top-1 accuracy, %",
            x_ticks=marked,
            labels=labels,
        )
        parts.append(f'<div class="{kind}">{chart}{"" if labels else legend(lines)}</div>')
    caption = "Lines: means. Bars: standard deviation over seeds. Small dots: single seeds. The axis is logarithmic."
    return f"<figure><h3>{title}</h3>{''.join(parts)}<figcaption>{caption}</figcaption></figure>"


def metric_of(curve: Mapping[str, Any]) -> str:
    """val/accuracy is the accuracy."""
    return curve["metric"].split("/")[-1]


def captions(results: Results, curve: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the objective of a curve says of its figures, by their names."""
    return results["captions"].get(curve["arm"], {}).get(curve["stage"], {}).get("metrics", {})


def caption(results: Results, curve: Mapping[str, Any]) -> Mapping[str, Any]:
    """How a curve is shown: as its objective says, under its own name if that says nothing."""
    metric = metric_of(curve)
    return captions(results, curve).get(metric, LOSS if metric == "loss" else LOSS | {"title": metric})


def learning_curves(results: Results, stage: str) -> str:
    """Small charts: for pretraining one an arm, with guesses that need no learning; then one a label fraction."""
    curves = [curve for curve in results["curves"] if curve["stage"] == stage and finite(curve["points"])]
    by = "arm" if stage == "pretrain" else "fraction"
    panels: dict[tuple[Any, str], list[Mapping[str, Any]]] = {}
    for curve in curves:
        metric = metric_of(curve)  # neighbours tell classes, whatever it is that the objective is right about
        kind = SHARES if caption(results, curve)["share"] and metric not in NEIGHBOURS else metric
        panels.setdefault((curve[by], kind), []).append(curve)
    order = [arm["name"] for arm in results["arms"]]
    keys = sorted(panels, key=lambda key: (order.index(key[0]) if by == "arm" else key[0], key[1] != SHARES, key[1]))
    name = titles(results)
    charts = []
    for number, key in enumerate(keys):
        title = name[key[0]] if by == "arm" else f"{share(key[0])} of the labels"
        y_title = _y_title(results, panels[key])
        lines = _curve_lines(results, panels[key], by)
        text = f"{y_title} against images seen"
        chart = line_chart(
            f"{stage}-{number}",
            title,
            text,
            lines,
            size=SMALL,
            x_title="images seen",
            y_title=y_title,
            x_ticks=_log_ticks(lines),
        )
        below = legend(lines) if by == "arm" or len(keys) == 1 else ""
        charts.append(f"<figure><h4>{escape(title)}</h4>{chart}{below}</figure>")
    shared = legend(_arm_keys(results, curves)) if by == "fraction" and len(keys) > 1 else ""
    return f'{shared}<div class="panels">{"".join(charts)}</div>' if charts else ""


def _y_title(results: Results, curves: Sequence[Mapping[str, Any]]) -> str:
    """What the vertical axis of a panel shows: the figure that is learnt or, of several, the first one."""
    words = sorted((caption(results, curve) for curve in curves), key=lambda words: words["guess"])[0]
    return words["title"] + ", %" * words["share"]


def _log_ticks(lines: Sequence[Line]) -> list[tuple[float, str]] | None:
    """For a logarithmic axis, where short lines would hardly be seen beside the longest."""
    ends = [line.points[-1][0] for line in lines]
    starts = [right for line in lines for right, _ in line.points]
    if min(starts) <= 0 or max(ends) < UNEQUAL * min(ends):
        return None
    return [(value, plain(value)) for value in powers(min(starts), max(ends))]


def _arm_keys(results: Results, curves: Sequence[Mapping[str, Any]]) -> list[Line]:
    """For a legend that several charts share."""
    look, name, drawn = looks(results), titles(results), {curve["arm"] for curve in curves}
    arms = [arm for arm in results["arms"] if arm["name"] in drawn]
    return [Line(name[arm["name"]], look[arm["name"]], (), dash=dash(arm)) for arm in arms]


def _curve_lines(results: Results, curves: Sequence[Mapping[str, Any]], by: str) -> list[Line]:
    """One line for each arm and metric, the mean of its seeds; guesses without learning are neutral and broken."""
    look, name = looks(results), titles(results)
    arms = {arm["name"]: arm for arm in results["arms"]}
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for curve in curves:
        groups.setdefault((curve["arm"], metric_of(curve)), []).append(curve)
    several = len({metric for _, metric in groups}) > 1
    lines = []
    for (arm, metric), group in groups.items():
        words = caption(results, group[0])
        scale, guess = (100 if words["share"] else 1), words["guess"]
        seeds = [[(right, scale * up) for right, up in finite(curve["points"])] for curve in group]
        title = words["title"] if by == "arm" else f"{name[arm]}: {words['title']}" if several else name[arm]
        broken = dash(arms[arm]) if by == "fraction" else ""
        if guess:
            guesses = [one for one, words in captions(results, group[0]).items() if words["guess"]]
            broken = DASHES[guesses.index(metric) % len(DASHES)]
        marks: Literal["last", "none"] = "none" if guess else "last"
        single = seeds if len(seeds) > 1 and not guess else ()
        lines.append(Line(title, -1 if guess else look[arm], _mean(seeds), single=single, dash=broken, marks=marks))
    return lines


def _mean(seeds: Sequence[Sequence[Point]]) -> list[Point]:
    """The mean of lines at the places that all of them have; of lines without such places the first."""
    heights: dict[float, list[float]] = {}
    for line in seeds:
        for right, up in line:
            heights.setdefault(right, []).append(up)
    shared = [(right, fmean(ups)) for right, ups in sorted(heights.items()) if len(ups) == len(seeds)]
    return shared or list(seeds[0])


def class_charts(results: Results, fractions: Sequence[float]) -> str:
    """For each unlabelled arm the classes' gains, at the fraction where its whole gain is largest; the rest folded."""
    found = index(results)
    parts = []
    names = displayed(list(map(str, results["data"]["classes"])))
    for arm in unlabelled(results):
        charts = {fraction: _class_chart(results, arm, fraction, names) for fraction in fractions}
        charts = {fraction: chart for fraction, chart in charts.items() if chart}
        if charts:
            gains = {fraction: _gain(found.get((arm["name"], "finetune", fraction, "top1"))) for fraction in charts}
            best = max(gains, key=gains.__getitem__)
            others = "".join(chart for fraction, chart in charts.items() if fraction != best)
            folded = f"<details><summary>Other label fractions</summary>{others}</details>" if others else ""
            parts.append(f"<h3>{escape(arm['title'])}</h3>{charts[best]}{folded}")
    return "".join(parts)


def _gain(row: Mapping[str, Any] | None) -> float:
    return row["difference"]["mean"] if row and row["difference"] else -inf


def class_gains(results: Results, arm: str, fraction: float) -> dict[int, list[float]]:
    """For each class the differences to the baseline, one a seed that both have."""
    scored = {(one["arm"], one["seed"], one["fraction"]): one["accuracy"] for one in results["per_class"]}
    gains: dict[int, list[float]] = {}
    for (name, seed, where), accuracy in scored.items():
        base = scored.get((results["baseline"], seed, fraction))
        if name == arm and where == fraction and base:
            for number, (ours, theirs) in enumerate(zip(accuracy, base, strict=True)):
                if ours is not None and theirs is not None:
                    gains.setdefault(number, []).append(ours - theirs)
    return gains


def _class_chart(results: Results, arm: Mapping[str, Any], fraction: float, names: Sequence[str]) -> str:
    gains = class_gains(results, arm["name"], fraction)
    order = sorted(gains, key=lambda number: -fmean(gains[number]))
    if arm["name"] == results["baseline"] or not order:
        return ""
    half = MOST_CLASSES // 2
    shown = [("", order)]
    if len(order) > MOST_CLASSES:
        shown = [(f"The {half} that gain most", order[:half]), (f"The {half} that gain least", order[-half:])]
    look = looks(results)[arm["name"]]
    groups = []
    for head, some in shown:
        bars = [_class_bar(arm, fraction, one, names[one], gains[one], look) for one in some]
        groups.append((head, bars))
    several = any(len(values) > 1 for values in gains.values())
    caption = (
        f"At {share(fraction)} of the labels: difference to the baseline in percentage points, mean"
        f"{' ± standard deviation over seeds' if several else ' (one seed)'}"
        + f"; the {len(order) - MOST_CLASSES:,} classes between these are left out"
        * (len(order) > MOST_CLASSES)
    )
    return bar_rows(caption, ("Class", "Points"), groups, solid=True)


def _class_bar(
    arm: Mapping[str, Any], fraction: float, number: int, name: str, values: Sequence[float], look: int
) -> Bar:
    mean, sd = fmean(values), stdev(values) if len(values) > 1 else None
    words = figure("mean", mean, SHARE(mean, signed=True))
    low, high = (None, None) if sd is None else (100 * (mean - sd), 100 * (mean + sd))
    if sd is not None:
        words += f" <small>± {figure('sd', sd, SHARE(sd))}</small>"
    keys = {"arm": arm["name"], "fraction": fraction, "metric": "class", "class": number}
    return Bar(name, 100 * mean, low, high, words, look, attributes(**keys))


def pictures(results: Results) -> str:
    parts = []
    name = titles(results)
    for picture in results["pictures"]:
        words = results["captions"].get(picture["arm"], {}).get("pretrain", {}).get("pictures", {})
        rows = "; ".join(f"{row}: {words[row]}" if row in words else row for row in picture["rows"])
        title = f"{name.get(picture['arm'], picture['arm'])}, seed {picture['seed']}"
        parts.append(
            f'<figure class="picture"><img{_size(picture["png"])} src="data:image/png;base64,{escape(picture["png"])}" '
            f'alt="{escape(title)}: rows of images: {escape(rows)}">'
            f"<figcaption><b>{escape(title)}.</b> Rows from the top: {escape(rows)}.</figcaption></figure>"
        )
    return "".join(parts)


def _size(png: str) -> str:
    """The attributes width and height of a picture, a whole multiple of its own so that pixels stay square."""
    try:
        width, height = struct.unpack(">II", base64.b64decode(png[:32], validate=True)[16:24])  # of the chunk IHDR
    except (binascii.Error, struct.error):
        return ""
    times = max(1, PICTURE_WIDTH // max(1, width))
    return f' width="{times * width}" height="{times * height}"'
