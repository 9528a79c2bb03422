"""Charts of the report: points within their frames, gaps at missing values, names as text."""

import math
import re

from gavamoe.report.charts import Interval, Series, interval_chart, line_chart


def test_chart_breaks_at_missing_values_and_names_groups() -> None:
    chart = str(
        line_chart("T <x>", [Series("a", [0, 1, 2, 3], [1.0, None, math.nan, 2.0])], ticks=["p", "q", "r", "s"])
    )
    assert "T &lt;x&gt;" in chart
    path = chart.split('class="s0" d="')[1].split('"')[0]
    assert path.count("M") == 2
    assert "L" not in path
    assert all(f">{name}</text>" in chart for name in "pqrs")
    assert ">0</text>" in chart  # charts of groups start at 0
    assert str(line_chart("none", [Series("a", [0.0], [None])])) == ""


def test_chart_scales_points_into_its_frame() -> None:
    values = [1e-9 * n for n in range(1000)]
    chart = str(line_chart("t", [Series("a", range(1000), values), Series("b", [5], [1e-7])], x_label="step"))
    numbers = [pair.split() for pair in chart.split('class="s0" d="M')[1].split('"')[0].split("L")]
    assert len(numbers) <= 240
    assert all(0 <= float(x) <= 360 and 0 <= float(y) <= 200 for x, y in numbers)
    heights = [float(y) for _, y in numbers]
    assert heights == sorted(heights, reverse=True)
    assert math.isfinite(heights[-1])
    assert "<span>" in chart  # two lines have a legend
    assert "nan" not in str(line_chart("t", [Series("a", [3.0], [5.0])]))


def test_interval_chart_keeps_within_its_frame() -> None:
    chart = str(interval_chart("t <x>", [Interval("a <b>", 1.0, 0.5, 2.0), Interval("b", 3.0, 3.0, 3.0)], marked=1))
    assert "t &lt;x&gt;" in chart
    assert "a &lt;b&gt;" in chart
    places = [float(value) for value in re.findall(r'(?:cx|x1|x2)="([\d.]+)"', chart)]
    assert all(150 <= place <= 348 for place in places)
    assert chart.count('class="d0"') == 1
    assert str(interval_chart("t", [])) == ""
