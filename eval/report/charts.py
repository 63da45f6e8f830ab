"""Charts as inline SVG: lines over a linear or logarithmic axis, and rows of dots or bars with whiskers.

Nothing here knows what is drawn. Colours are classes (`c0`, `c1`, ...) that the page's style sheet fills in, so that
one chart serves light and dark. Each look has a colour and a marker of its own: colour is never the only sign.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

COLOURS = 7  # report.css has as many
DOT = 4  # pixels, radius of a marker
LETTER = 6.6  # pixels that a letter of a label is wide, at most (12 pixels high, a system font)
LINE = 16  # pixels between labels that stand at the ends of lines
LEFT = 46  # pixels, for the numbers of the vertical axis
WIDER = 1.35  # times, that a logarithmic axis reaches beyond its ends
MOST_POINTS = 200  # of a line that is drawn; longer ones are thinned
MOST_LABELS = 12  # at the ends of lines; for more there is only the legend
CORNERS = {  # of markers, in DOTs right of and below the middle: square, triangle, diamond
    1: ((-1, -1), (1, -1), (1, 1), (-1, 1)),
    2: ((0, -1.3), (1.2, 1), (-1.2, 1)),
    3: ((0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)),
}

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One line of a chart: its means, and whatever stands behind them."""

    title: str
    look: int  # which colour and marker; -1 is neutral
    points: Sequence[Point]
    spread: Sequence[float | None] = ()  # half the length of each point's error bar
    single: Sequence[Sequence[Point]] = ()  # lines of single seeds, thin
    dots: Sequence[Point] = ()  # results of single seeds
    dash: str = ""
    marks: Literal["all", "last", "none"] = "last"  # which points get markers

    def heights(self) -> list[float]:
        """Every value that the chart must have room for."""
        bars = [
            height + sign * bar
            for (_, height), bar in zip(self.points, self.spread, strict=False)
            if bar is not None
            for sign in (-1, 1)
        ]
        return [y for line in (self.points, self.dots, *self.single) for _, y in line] + bars


@dataclass(frozen=True)
class Axis:
    """From values to pixels."""

    low: float
    high: float
    start: float  # pixel of `low`
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        scale: Callable[[float], float] = math.log10 if self.log else float
        share = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return round(self.start + share * (self.end - self.start), 1)


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers within [low, high]."""
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * digit for digit in (1, 2, 5, 10) if power * digit >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def powers(low: float, high: float) -> list[float]:
    """Powers of ten within [low, high], with their halves and fifths where there is only one or none."""
    tens = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    inside = [value for value in tens if low <= value <= high]
    if len(inside) > 1:
        return inside
    return [value * part for value in tens for part in (0.2, 0.5, 1) if low <= value * part <= high]


def plain(value: float) -> str:
    """A tick's number as people write it: 0.05, 40, 200k, 1.5M, and a true minus sign."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{name}".replace("-", "−")
    return f"{value + 0:.4g}".replace("-", "−")


def room(values: Sequence[float], margin: float = 0.06) -> tuple[float, float]:
    """A range with a margin around the values; never empty."""
    low, high = min(values), max(values)
    pad = margin * (high - low) or max(abs(high) * margin, 1e-3)
    return low - pad, high + pad


def finite(points: Sequence[Point]) -> list[Point]:
    """The points that can be drawn, thinned where there are very many; the last one stays."""
    good = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    stride = max(1, math.ceil(len(good) / MOST_POINTS))
    return good[::stride] + ([good[-1]] if good and (len(good) - 1) % stride else [])


def marker(x: float, y: float, look: int) -> str:
    """A circle, square, triangle or diamond."""
    if look < 0 or look % 4 == 0:
        return f'<circle cx="{x}" cy="{y}" r="{DOT}"/>'
    corners = " ".join(f"{x + DOT * right:.1f},{y + DOT * down:.1f}" for right, down in CORNERS[look % 4])
    return f'<polygon points="{corners}"/>'


def colour(look: int) -> str:
    return f"c{look % COLOURS}" if look >= 0 else "neutral"


def swatch(look: int, dash: str = "", *, marked: bool = True) -> str:
    """A line, and its marker, for a legend."""
    return (
        f'<svg class="swatch {colour(look)}" width="30" height="12" viewBox="0 0 30 12" aria-hidden="true">'
        f'<path class="line" d="M1 6H29" stroke-dasharray="{dash or "none"}"/>'
        f"{marker(15, 6, look) if marked else ''}</svg>"
    )


def legend(lines: Sequence[Line]) -> str:
    items = "".join(
        f"<li>{swatch(line.look, line.dash, marked=line.marks != 'none')}{escape(line.title)}</li>" for line in lines
    )
    return f'<ul class="legend">{items}</ul>'


def _path(points: Sequence[Point], x: Axis, y: Axis, kind: str, dash: str = "") -> str:
    steps = "L".join(f"{x(right)} {y(up)}" for right, up in points)
    return f'<path class="{kind}" d="M{steps}" stroke-dasharray="{dash or "none"}"/>'


def _drawn(line: Line, x: Axis, y: Axis, shift: float, beside: float) -> str:
    """One line with all that belongs to it, moved right by `shift` pixels so that error bars stand side by side.

    Results of single seeds stand `beside` pixels right of their mean, which would hide them.
    """
    parts = [_path(single, x, y, "single") for single in line.single if len(single) > 1]
    if len(line.points) > 1:
        parts.append(_path(line.points, x, y, "line", line.dash))
    for (right, up), bar in zip(line.points, line.spread, strict=False):
        if bar:
            parts.append(f'<path class="bar" d="M{x(right)} {y(up - bar)}V{y(up + bar)}"/>')
    parts += [f'<circle class="dot" cx="{x(right) + beside:.1f}" cy="{y(up)}" r="1.8"/>' for right, up in line.dots]
    marked = {"all": line.points, "last": line.points[-1:], "none": ()}[line.marks]
    parts += [marker(x(right), y(up), line.look) for right, up in marked]
    moved = f' transform="translate({shift:.1f} 0)"' if shift else ""
    return f'<g class="{colour(line.look)}"{moved}><title>{escape(line.title)}</title>{"".join(parts)}</g>'


def _apart(wanted: Sequence[float], low: float, high: float) -> list[float]:
    """Heights near the wanted ones, at least LINE apart and within [low, high] where there is room."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    placed = list(wanted)
    for before, index in zip([None, *order], order, strict=False):
        least = low if before is None else placed[before] + LINE
        placed[index] = max(placed[index], least)
    limit = high
    for index in reversed(order):
        placed[index] = min(placed[index], limit)
        limit = placed[index] - LINE
    return placed


def _end_labels(lines: Sequence[Line], x: Axis, y: Axis, shifts: Sequence[float], letters: int) -> str:
    """Each line's name at its end, moved up or down where names would overlap."""
    ends = [(x(line.points[-1][0]), y(line.points[-1][1])) for line in lines]
    parts = []
    heights = _apart([up for _, up in ends], y.end + 4, y.start)
    for line, shift, (right, up), height in zip(lines, shifts, ends, heights, strict=True):
        name = line.title if len(line.title) <= letters else line.title[: letters - 1].rstrip() + "…"
        parts.append(
            f'<path class="leader" d="M{right + shift + 8:.1f} {up}L{x.end + 20:.1f} {height:.1f}"/>'
            f'<g class="{colour(line.look)}">{marker(x.end + 27, height, line.look)}'
            f'<text x="{x.end + 36:.1f}" y="{height + 4:.1f}">{escape(name)}</text></g>'
        )
    return "".join(parts)


def _axes(x: Axis, y: Axis, x_ticks: Sequence[tuple[float, str]], x_title: str, y_title: str) -> str:
    parts = []
    for value in ticks(y.low, y.high, round((y.start - y.end) / 38)):
        parts.append(
            f'<path class="grid" d="M{x.start} {y(value)}H{x.end}"/>'
            f'<text class="tick" x="{x.start - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{plain(value)}</text>'
        )
    for value, name in x_ticks:
        parts.append(
            f'<path class="grid" d="M{x(value)} {y.start}v5"/>'
            f'<text class="tick" x="{x(value)}" y="{y.start + 19:.1f}" text-anchor="middle">{escape(name)}</text>'
        )
    middle = (x.start + x.end) / 2
    parts.append(f'<path class="axis" d="M{x.start} {y.start}H{x.end}"/>')
    parts.append(
        f'<text class="tick" x="{middle}" y="{y.start + 38:.1f}" text-anchor="middle">{escape(x_title)}</text>'
    )
    parts.append(f'<text class="tick" x="0" y="11">{escape(y_title)}</text>')
    return "".join(parts)


def line_chart(
    name: str,
    title: str,
    description: str,
    lines: Sequence[Line],
    *,
    size: tuple[int, int],
    x_title: str,
    y_title: str,
    x_ticks: Sequence[tuple[float, str]] | None = None,
    labels: bool = False,
) -> str:
    """An SVG of `size` (width, height) in pixels, with an id `name` of its own on the page.

    With `x_ticks` the x axis is logarithmic and shows those; `labels` puts the lines' names at their ends.
    """
    width, height = size
    lines = [line for line in lines if line.points]
    letters = min(32, max(len(line.title) for line in lines)) if labels else 0
    y = Axis(*room([value for line in lines for value in line.heights()]), height - 46, 24)
    values = [right for line in lines for right, _ in line.points]
    end = width - (LETTER * letters + 40 if letters else 16)
    if x_ticks:
        x = Axis(min(values) / WIDER, max(values) * WIDER, LEFT, end, log=True)
    else:
        x = Axis(min(0, *values), max(1, *values), LEFT, end)
        x_ticks = [(value, plain(value)) for value in ticks(x.low, x.high, max(2, (width - 60) // 90))]
    apart = (
        min(11, (end - LEFT) / (3 * len(x_ticks) * len(lines))) if x.log and lines[0].marks == "all" else 0
    )  # pixels between arms of a tick
    shifts = [apart * (index - (len(lines) - 1) / 2) for index in range(len(lines))]
    body = [_axes(x, y, x_ticks, x_title, y_title)]
    body += [_drawn(line, x, y, shift, 0.5 * apart) for line, shift in zip(lines, shifts, strict=True)]
    if letters:
        body.append(_end_labels(lines, x, y, shifts, letters))
    return (
        f'<svg class="chart" role="img" viewBox="0 0 {width} {height}" aria-labelledby="{name}-title {name}-text">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-text">{escape(description)}</desc>'
        f"{''.join(body)}</svg>"
    )


@dataclass(frozen=True)
class Bar:
    """One row of a chart of rows: a value, how far it may be off, and the value in words (HTML)."""

    label: str
    value: float
    low: float | None
    high: float | None
    words: str
    look: int = -1
    attributes: str = ""  # of the row, HTML


def _track(bar: Bar, axis: Axis, marks: Sequence[float], solid: bool) -> str:
    """A bar from zero, or a dot, with its whisker; horizontal places are shares of whatever width there is."""
    parts = []
    for mark in marks:
        kind = "zero" if abs(mark) < 1e-12 else "grid"
        parts.append(f'<line class="{kind}" x1="{axis(mark)}%" x2="{axis(mark)}%" y1="0" y2="100%"/>')
    zero, place = axis(0), axis(bar.value)
    if solid:
        parts.append(f'<rect x="{min(zero, place):.1f}%" width="{abs(place - zero):.1f}%" y="22%" height="56%"/>')
    if bar.low is not None and bar.high is not None:
        low, high = (axis(min(max(value, axis.low), axis.high)) for value in (bar.low, bar.high))
        parts.append(f'<line class="bar" x1="{low}%" x2="{high}%" y1="50%" y2="50%"/>')
    if not solid:
        parts.append(f'<circle cx="{place}%" cy="50%" r="5"/>')
    return f'<svg class="{colour(bar.look)}" aria-hidden="true">{"".join(parts)}</svg>'


def bar_rows(caption: str, heads: tuple[str, str], groups: Sequence[tuple[str, Sequence[Bar]]], *, solid: bool) -> str:
    """A table whose middle column draws each row's value and whisker on one axis; very long whiskers are cut."""
    bars = [bar for _, rows in groups for bar in rows]
    far = 2.5 * max(abs(bar.value) for bar in bars) or 1.0
    ends = [end for bar in bars for end in (bar.low, bar.high) if end is not None]
    axis = Axis(*room([0, *(bar.value for bar in bars), *(min(max(end, -far), far) for end in ends)], 0.08), 0, 100)
    marks = ticks(axis.low, axis.high, 6)
    scale = "".join(f'<span style="left:{axis(mark)}%">{plain(mark)}</span>' for mark in marks)
    parts = []
    for heading, rows in groups:
        named = f'<tr><th class="group" colspan="3" scope="rowgroup">{escape(heading)}</th></tr>' if heading else ""
        parts.append(f"<tbody>{named}")
        for bar in rows:
            parts.append(
                f'<tr{bar.attributes}><th scope="row">{escape(bar.label)}</th>'
                f'<td class="track">{_track(bar, axis, marks, solid)}</td><td class="words">{bar.words}</td></tr>'
            )
        parts.append("</tbody>")
    head = (
        f'<th scope="col">{escape(heads[0])}</th><th class="scale" aria-hidden="true"><div>{scale}</div></th>'
        f'<th scope="col" class="words">{escape(heads[1])}</th>'
    )
    body = f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>{''.join(parts)}"
    return f'<table class="bars">{body}</table>'
