"""Line charts as inline SVG, for the report: no script, no image files, colors from the page's style sheet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 26
ROW_HEIGHT, ROW_LABELS = 22, 150
"""Height of a line of an interval chart, and the width of its labels."""
MAX_POINTS = 240
"""Points of a line at most; of longer series evenly spaced ones are drawn."""
COLORS = 6
"""Series beyond this many share the last color of the style sheet (.s0 to .s5)."""


@dataclass(frozen=True)
class Series:
    """One line of a chart: points (x, y) in drawing order; y None or not finite breaks the line."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]


def line_chart(title: str, series: Sequence[Series], *, x_label: str = "", ticks: Sequence[str] = ()) -> Markup:
    """A chart with a title, a legend when it has several series, and `ticks` as names of x = 0, 1, 2, ...

    With `ticks`, which compare groups, the vertical axis takes in 0, so that small differences look small.

    Returns an empty string when no series has a point.
    """
    shown = [_thinned(one) for one in series]
    points = [(x, y) for one in shown for x, y in zip(one.x, one.y, strict=True) if _finite(y)]
    if not points:
        return Markup("")
    low_x, high_x = _bounds([x for x, _ in points])
    heights = [float(y) for _, y in points if y is not None]
    marks = _marks(*_bounds([*heights, 0.0] if ticks else heights))
    scale = _Scale(low_x, high_x, marks[0], marks[-1])
    parts = [_grid(scale, marks), _x_axis(scale, ticks, x_label)]
    parts += [_line(scale, one, min(index, COLORS - 1)) for index, one in enumerate(shown)]
    legend = Markup("").join(
        Markup('<span><i class="k{}"></i>{}</span>').format(min(index, COLORS - 1), one.label)
        for index, one in enumerate(shown)
        if len(shown) > 1
    )
    return Markup(
        '<figure class="chart"><figcaption>{}</figcaption><svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>'
        '<div class="legend">{}</div></figure>'
    ).format(title, WIDTH, HEIGHT, title, Markup("").join(parts), legend)


@dataclass(frozen=True)
class Interval:
    """A value with its interval: one line of an interval chart."""

    label: str
    """Name at the left of the line."""
    value: float
    """The value, at which the dot is drawn."""
    low: float
    """Lower end of the interval; equal to `value` where there is none."""
    high: float
    """Upper end of the interval; equal to `value` where there is none."""


def interval_chart(title: str, intervals: Sequence[Interval], *, marked: int = 0, zero: bool = False) -> Markup:
    """A dot and its interval for each value, from top to bottom, on one scale; the one at `marked` stands out.

    Args:
        zero: differences, which lie left or right of 0: the scale takes it in, and those whose interval leaves it out
            stand out.

    Returns an empty string if there are none.
    """
    if not intervals:
        return Markup("")
    ends = [bound for one in intervals for bound in (one.low, one.high)]
    marks = _marks(*_bounds([*ends, 0.0] if zero else ends))
    scale = _Scale(marks[0], marks[-1], 0.0, 1.0, left=ROW_LABELS)
    height = ROW_HEIGHT * len(intervals) + 24
    parts = [
        Markup(
            '<line class="grid" x1="{0:.1f}" x2="{0:.1f}" y1="4" y2="{1}"/><text x="{0:.1f}" y="{2}" '
            'text-anchor="middle">{3}</text>'
        ).format(scale.x(mark), height - 20, height - 6, _mark(mark))
        for mark in marks[:: 1 + (len(marks) > 5)]
    ]
    if zero:
        parts.append(
            Markup('<line class="zero" x1="{0:.1f}" x2="{0:.1f}" y1="4" y2="{1}"/>').format(scale.x(0.0), height - 20)
        )
    for row, one in enumerate(intervals):
        y = ROW_HEIGHT * (row + 0.5) + 4
        stands_out = (one.low > 0 or one.high < 0) if zero else row == marked
        parts.append(
            Markup(
                '<text x="{}" y="{:.1f}" class="ty">{}</text><line class="s{c}" x1="{:.1f}" x2="{:.1f}" y1="{y:.1f}" '
                'y2="{y:.1f}" stroke-width="2"/><g><title>{}</title><circle class="d{c}" cx="{:.1f}" cy="{y:.1f}" '
                'r="4"/></g>'
            ).format(
                ROW_LABELS - 8,
                y + 4,
                one.label,
                scale.x(one.low),
                scale.x(one.high),
                f"{one.label}: {one.value:.4g}",
                scale.x(one.value),
                c=0 if stands_out else COLORS - 1,
                y=y,
            )
        )
    return Markup(
        '<figure class="chart"><figcaption>{}</figcaption><svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>'
        "</figure>"
    ).format(title, WIDTH, height, title, Markup("").join(parts))


@dataclass(frozen=True)
class _Scale:
    low_x: float
    high_x: float
    low_y: float
    high_y: float
    left: int = LEFT

    def x(self, value: float) -> float:
        return self.left + (value - self.low_x) / (self.high_x - self.low_x) * (WIDTH - self.left - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.low_y) / (self.high_y - self.low_y) * (HEIGHT - TOP - BOTTOM)


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _thinned(series: Series) -> Series:
    """At most MAX_POINTS evenly chosen points, the last among them."""
    size = len(series.x)
    if size <= MAX_POINTS:
        return series
    chosen = [round(i * (size - 1) / (MAX_POINTS - 1)) for i in range(MAX_POINTS)]
    return Series(series.label, [series.x[i] for i in chosen], [series.y[i] for i in chosen])


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    """Smallest and largest value, apart even when all are equal."""
    low, high = min(values), max(values)
    pad = 0.0 if high > low else max(abs(low) * 0.1, 0.5)
    return low - pad, high + pad


def _marks(low: float, high: float) -> list[float]:
    """Three to seven round numbers from at or below `low` to at or above `high`."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    first = math.floor(low / step)
    last = math.ceil(high / step)
    return [index * step for index in range(first, last + 1)]


def _mark(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _grid(scale: _Scale, marks: Sequence[float]) -> Markup:
    return Markup("").join(
        Markup(
            '<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/><text x="{}" y="{:.1f}" class="ty">{}</text>'
        ).format(LEFT, WIDTH - RIGHT, y, y, LEFT - 6, y + 4, _mark(mark))
        for mark in marks
        for y in [scale.y(mark)]
    )


def _x_axis(scale: _Scale, ticks: Sequence[str], label: str) -> Markup:
    places = [(float(x), name) for x, name in enumerate(ticks)] or [
        (end, f"{end:.6g}") for end in (scale.low_x, scale.high_x)
    ]
    inside = [(x, name) for x, name in places if scale.low_x <= x <= scale.high_x]
    texts = [_x_text(scale.x(x), name) for x, name in inside]
    if label and not ticks:
        texts.append(_x_text((LEFT + WIDTH - RIGHT) / 2, label))
    return Markup("").join(texts)


def _x_text(x: float, name: str) -> Markup:
    anchor = "start" if x < LEFT + 20 else "end" if x > WIDTH - RIGHT - 20 else "middle"
    return Markup('<text x="{:.1f}" y="{}" text-anchor="{}">{}</text>').format(x, HEIGHT - 8, anchor, name)


def _line(scale: _Scale, series: Series, color: int) -> Markup:
    """A path with a gap wherever y is missing; a dot for a series of one point."""
    path: list[str] = []
    pen_down, last = False, (0.0, 0.0)
    for x, y in zip(series.x, series.y, strict=True):
        if y is None or not math.isfinite(y):
            pen_down = False
            continue
        last = (scale.x(x), scale.y(y))
        path.append(f"{'L' if pen_down else 'M'}{last[0]:.1f} {last[1]:.1f}")
        pen_down = True
    dot = Markup('<circle class="d{}" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(color, *last)
    line = Markup('<path class="s{}" d="{}"><title>{}</title></path>').format(color, " ".join(path), series.label)
    return line + (dot if path else Markup(""))
