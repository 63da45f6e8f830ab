import re
from itertools import pairwise

import pytest

from mpp.eval.report.charts import Axis, Bar, Line, _apart, bar_rows, line_chart, powers, ticks


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 47.1), (26.3, 91), (0, 5e6), (0.4001, 0.4002), (-1e-9, 1e-9)])
def test_ticks_are_few_round_and_inside(low, high):
    found = ticks(low, high, 5)
    assert 3 <= len(found) <= 6
    assert low - 1e-12 <= min(found) < max(found) <= high * (1 + 1e-12)
    digits = [f"{b - a:.3e}" for a, b in pairwise(found)]
    assert len(set(digits)) == 1
    assert digits[0][0] in "125"


def test_powers_of_ten_mark_a_logarithmic_axis():
    assert powers(300, 2e6) == [1e3, 1e4, 1e5, 1e6]
    assert powers(1500, 9000) == [2000, 5000]
    assert powers(600, 7000) == [1000, 2000, 5000]


def test_labels_stand_apart_and_in_their_order():
    wanted = [30.0, 31.0, 200.0, 29.0, 198.0]
    placed = _apart(wanted, 20, 205)
    order = sorted(range(5), key=wanted.__getitem__)
    assert order == sorted(range(5), key=placed.__getitem__)
    heights = sorted(placed)
    assert all(b - a >= 16 for a, b in pairwise(heights))
    assert heights[0] >= 20
    assert heights[-1] <= 205
    assert _apart([50.0, 100.0], 0, 200) == [50, 100], "none moves without need"


def test_points_lie_where_their_values_say():
    line = Line("a", 0, [(0.01, 20.0), (0.1, 40.0), (1.0, 60.0)], marks="all")
    svg = line_chart(
        "x", "t", "d", [line], size=(400, 300), x_title="x", y_title="y", x_ticks=[(0.01, "1"), (1.0, "100")]
    )
    places = [(float(a), float(b)) for a, b in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2), "the axis is logarithmic"
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    ticked = {float(text): float(y) - 4 for y, text in re.findall(r'y="([\d.]+)" text-anchor="end">(\d+)<', svg)}
    assert ticked[40] == pytest.approx(y1, abs=0.2)
    assert Axis(1, 100, 0, 10, log=True)(10) == 5


def test_whiskers_end_where_the_interval_ends():
    html = bar_rows(
        "c", ("a", "b"), [("", [Bar("one", 2.0, -1.0, 5.0, "w"), Bar("two", 5.0, None, None, "w")])], solid=False
    )
    left, right = (float(place) for place in re.search(r'class="bar" x1="([\d.]+)%" x2="([\d.]+)%"', html).groups())
    dots = [float(place) for place in re.findall(r'cx="([\d.]+)%"', html)]
    zero = float(re.search(r'class="zero" x1="([\d.]+)%"', html).group(1))
    unit = (dots[0] - zero) / 2
    assert (left, right, dots[1]) == pytest.approx((zero - unit, zero + 5 * unit, zero + 5 * unit), abs=0.2)
    assert html.count('class="bar"') == 1
