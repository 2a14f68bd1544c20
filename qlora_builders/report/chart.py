"""A line chart as SVG that stretches to any width, with its labels as HTML around it.

The drawing fills a box of 1000 by 1000 units and is stretched without keeping its shape, while
strokes keep their width (`vector-effect`) and labels their size; so the page needs no script to fit
a phone, and nothing moves when it has loaded. The script only reads values off: it finds them in
the `data-` attributes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from xml.etree.ElementTree import Element

from qlora_builders.report.html import element, fold, table
from qlora_builders.report.series import (
    Series,
    bounds,
    log_ticks,
    smoothed,
    spell,
    spell_step,
    thin_out,
    ticks,
)

SIZE = 1000
NUM_COLORS = 8
_SMOOTH_FROM = 80  # points
_TABLE_ROWS = 40


@dataclass(frozen=True)
class Chart:
    """What to draw. All series share both axes.

    `from_zero`: the y axis starts at 0 where no value is negative. `log`: it is logarithmic where
    the values span more than a factor of 100. `smooth`: long series get a moving average.
    """

    title: str
    unit: str
    series: Sequence[Series]
    x_label: str = "step"
    note: str = ""
    from_zero: bool = False
    log: bool = False
    smooth: bool = False
    marks: Sequence[tuple[float, str]] = ()  # x, what happened there
    wide: bool = False


@dataclass(frozen=True)
class _Axes:
    """Data to drawing: x and y as fractions, y counted from below."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    log: bool

    def x(self, value: float) -> float:
        low, high = self.x_range
        return (value - low) / (high - low)

    def y(self, value: float) -> float:
        low, high = self.y_range
        value = math.log10(value) if self.log else value
        return (value - low) / (high - low)

    def y_ticks(self) -> list[tuple[float, str]]:
        """(fraction, label)"""
        low, high = self.y_range
        if self.log:
            return [((t - low) / (high - low), spell(10**t)) for t in log_ticks(low, high)]
        return [(self.y(tick), spell(tick)) for tick in ticks(low, high)]


def draw(chart: Chart, *, name: str, limit: int) -> Element:
    """The figure: heading, legend, drawing and a foldable table.

    Args:
        name: id of the figure, unique on the page.
        limit: points of a series that are drawn; the extremes are always among them.
    """
    axes = _axes(chart)
    note = chart.note
    if axes.log:
        note = f"{note}; logarithmic axis".removeprefix("; ")
    is_smooth = chart.smooth and any(len(one.x) >= _SMOOTH_FROM for one in chart.series)
    if is_smooth:
        note = f"{note}; thin: as logged, bold: moving average".removeprefix("; ")
    heading = element(
        "h3", chart.title, element("small", f" {chart.unit}".rstrip()), id=f"{name}-heading"
    )
    return element(
        "figure",
        element("figcaption", heading, _legend(chart.series), element("p", note) if note else None),
        _plot(chart, axes, name, limit),
        _values(chart),
        class_="wide" if chart.wide else None,
        id=name,
    )


def _axes(chart: Chart) -> _Axes:
    xs = [x for one in chart.series for x in one.x]
    x_range = (min(xs), max(xs)) if xs else (0.0, 1.0)
    if x_range[0] == x_range[1]:
        x_range = (x_range[0] - 0.5, x_range[1] + 0.5)
    values = [value for one in chart.series for value in one.finite()]
    log = chart.log and bool(values) and min(values) > 0 and max(values) / min(values) > 100
    if log:
        low, high = math.log10(min(values)), math.log10(max(values))
        margin = (high - low) / 20
        return _Axes(x_range, (low - margin, high + margin), True)
    return _Axes(x_range, bounds(chart.series, from_zero=chart.from_zero), False)


def _legend(series: Sequence[Series]) -> Element | None:
    """One entry for each; a single curve is named by the heading."""
    if len(series) < 2:
        return None
    entries = [
        element("li", element("i", class_=f"{_color(one)}{' dot' if one.dots else ''}"), one.name)
        for one in series
    ]
    return element("ul", *entries, class_="legend")


def _plot(chart: Chart, axes: _Axes, name: str, limit: int) -> Element:
    y_ticks = axes.y_ticks()
    x_ticks = [
        (axes.x(tick), spell_step(tick)) for tick in ticks(*axes.x_range, 5) if tick == round(tick)
    ]
    grid = "".join(f"M0 {_at(1 - at)}H{SIZE}" for at, _ in y_ticks)
    description = f"{chart.title} over {chart.x_label}. " + "; ".join(map(_range, chart.series))
    marks = [
        element("path", element("title", what), d=f"M{_at(axes.x(x))} 0V{SIZE}", class_="mark")
        for x, what in chart.marks
        if axes.x_range[0] <= x <= axes.x_range[1]
    ]
    drawing = element(
        "svg",
        element("title", chart.title, id=f"{name}-title"),
        element("desc", description, id=f"{name}-desc"),
        element("path", d=grid, class_="grid"),
        *marks,
        *(path for one in chart.series for path in _curve(one, axes, chart, limit)),
        viewBox=f"0 0 {SIZE} {SIZE}",
        preserveAspectRatio="none",
        role="img",
        aria_labelledby=f"{name}-title {name}-desc",
    )
    box = element(
        "div",
        drawing,
        class_="plot",
        tabindex=0,
        role="group",
        aria_label=f"{chart.title}: arrow keys read values",
        data_x_label=chart.x_label,
        data_x_min=axes.x_range[0],
        data_x_max=axes.x_range[1],
    )
    y_labels = [element("span", text, style=f"bottom:{100 * at:.2f}%") for at, text in y_ticks]
    x_labels = [  # the last one would stick out of the page
        element("span", text, style=f"left:{100 * at:.2f}%", class_="last" if at > 0.95 else None)
        for at, text in x_ticks
    ]
    return element(
        "div",
        element("div", *y_labels, class_="y", aria_hidden="true"),
        box,
        element("div", *x_labels, class_="x", aria_hidden="true"),
        element("div", chart.x_label, class_="x-label", aria_hidden="true"),
        class_="chart",
    )


def _curve(one: Series, axes: _Axes, chart: Chart, limit: int) -> list[Element]:
    """The line with its data, and its moving average."""
    kept = thin_out(one, limit)
    smooth = chart.smooth and len(one.x) >= _SMOOTH_FROM
    kind = "dots" if one.dots else "thin" if smooth else "line"
    paths = [
        element(
            "path",
            d=_path(kept, axes),
            class_=f"{kind} {_color(one)}",
            data_name=one.name,
            data_x=" ".join(f"{x:.10g}" for x in kept.x),
            data_y=" ".join(f"{y:.5g}" for y in kept.y),
        )
    ]
    if one.dots:
        paths.append(element("path", d=_dots(kept, axes), class_=f"points {_color(one)}"))
    if smooth:
        average = Series(one.name, one.x, smoothed(one.y, max(3, len(one.y) // 100)))
        d = _path(thin_out(average, limit // 2), axes)
        paths.append(element("path", d=d, class_=f"line {_color(one)}"))
    return paths


def _path(one: Series, axes: _Axes) -> str:
    """Lines through the points, lifted where a value is not finite."""
    parts = []
    points = list(zip(one.x, one.y, strict=True))
    for finite, run in groupby(points, key=lambda point: math.isfinite(point[1])):
        if finite:
            line = "L".join(f"{_at(axes.x(x))} {_at(1 - axes.y(y))}" for x, y in run)
            parts.append(f"M{line}" if "L" in line else f"M{line}h0")
    return "".join(parts)


def _dots(one: Series, axes: _Axes) -> str:
    """Lines of no length, whose round caps are circles whatever the drawing is stretched to."""
    finite = [(x, y) for x, y in zip(one.x, one.y, strict=True) if math.isfinite(y)]
    return "".join(f"M{_at(axes.x(x))} {_at(1 - axes.y(y))}h0" for x, y in finite)


def _at(fraction: float) -> str:
    return f"{fraction * SIZE:.1f}".removesuffix(".0")


def _color(one: Series) -> str:
    """Past the last colour they come again, dashed."""
    again = " again" if one.color >= NUM_COLORS else ""
    return f"c{one.color % NUM_COLORS}{again}"


def _range(one: Series) -> str:
    values = one.finite()
    if not values:
        return f"{one.name}: no finite value"
    return (
        f"{one.name}: last {spell(values[-1])}, from {spell(min(values))} to {spell(max(values))}"
    )


def _values(chart: Chart) -> Element:
    """Some of the points, for those who cannot see the drawing or want the numbers."""
    xs = sorted({x for one in chart.series for x in one.x})
    shown = xs
    if len(xs) > _TABLE_ROWS:
        last = len(xs) - 1
        shown = [xs[round(i * last / (_TABLE_ROWS - 1))] for i in range(_TABLE_ROWS)]
    lookups = [dict(zip(one.x, one.y, strict=True)) for one in chart.series]
    rows = [[spell(x), *(spell(ys[x]) if x in ys else "" for ys in lookups)] for x in shown]
    caption = f"{chart.title}: {len(shown)} of {len(xs)} points"
    return fold(
        "values", table([chart.x_label, *(one.name for one in chart.series)], rows, caption=caption)
    )
