"""The charts of a page: what is over steps and what is over layers, drawn by matplotlib as SVG.

A drawing is made of numbers alone. What a run calls things stands in the HTML around it, where the
template escapes it; colours and fonts are the page's.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_builders.names import PROJECTIONS
from qlora_builders.report.run import LayerFigures, Run

NUM_COLORS = 8
_SMALL, _WIDE = (360, 215), (1160, 290)  # CSS pixels; a phone shows the small one as it is
# metric -> title, unit, options of Chart; what is evaluated too is drawn with its eval_METRIC
_METRICS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "loss": ("Loss", "nats per token", {"wide": True, "smooth": True}),
    "rewards/margins": ("Reward margin", "nats per pair, chosen less rejected", {"smooth": True}),
    "rewards/accuracies": (
        "Reward accuracy", "share of pairs", {"from_zero": True, "smooth": True}
    ),
    "lr": ("Learning rate", "", {"from_zero": True}),
    "grad_norm": ("Gradient norm", "before clipping", {"log": True, "smooth": True}),
    "tokens_per_s": ("Throughput", "tokens/s", {"from_zero": True, "smooth": True}),
    "peak_memory_mib": ("Peak memory", "MiB", {"from_zero": True}),
}  # fmt: skip
_DOTS_UP_TO = 40  # points of a curve that are marked one by one
_MOST_POINTS = 2400  # of a metric, all runs together; of one curve a quarter
_MOST_OTHER_METRICS = 12
_MOST_MARKS = 100
_SMOOTH_FROM = 80  # points
_TABLE_ROWS = 40
_ROUND = [1, 2, 2.5, 5, 10]  # between ticks, times a power of ten


@dataclass(frozen=True)
class Curve:
    """Where `y` is not finite the line is broken."""

    name: str
    x: Sequence[float]  # ascending
    y: Sequence[float]
    color: int = 0  # past the last one they come again, dashed
    dots: bool = False  # mark every point: there are few, and none between them

    @cached_property
    def finite(self) -> list[float]:
        return [value for value in self.y if math.isfinite(value)]


@dataclass(frozen=True)
class Chart:
    """What to draw. All curves share both axes.

    `from_zero`: the y axis starts at 0 where no value is negative. `log`: it is logarithmic where
    the values span more than a factor of 100. `smooth`: long curves get an average.
    """

    title: str
    unit: str
    curves: Sequence[Curve]
    x_label: str = "step"
    about: str = ""
    from_zero: bool = False
    log: bool = False
    smooth: bool = False
    wide: bool = False
    marks: Sequence[int] = ()  # steps after which a run was resumed

    @cached_property
    def range(self) -> tuple[float, float] | None:
        """The lowest and the highest finite value."""
        values = [value for curve in self.curves for value in curve.finite]
        return (min(values), max(values)) if values else None

    @property
    def is_log(self) -> bool:
        low, high = self.range or (0, 0)
        return self.log and low > 0 and 100 < high / low < 1e100

    def is_smooth(self, curve: Curve) -> bool:
        return self.smooth and len(curve.x) >= _SMOOTH_FROM

    @property
    def note(self) -> str:
        said = {
            self.about: True,
            "no finite value": self.range is None,
            "logarithmic axis": self.is_log,
            "thin: as logged, bold: averages": any(map(self.is_smooth, self.curves)),
        }
        return "; ".join(text for text, holds in said.items() if text and holds)

    @property
    def description(self) -> str:
        """For those who cannot see the drawing."""
        told = []
        for curve in self.curves:
            all, words = curve.finite, "no finite value"
            if all:
                words = f"last {spell(all[-1])}, from {spell(min(all))} to {spell(max(all))}"
            told.append(f"{curve.name}: {words}")
        return f"{self.title} over {self.x_label}. {'; '.join(told)}"

    @property
    def values(self) -> tuple[str, list[str], list[list[str]]]:
        """Some of the points as a table: caption, head, rows."""
        xs = sorted({x for curve in self.curves for x in curve.x})
        kept = np.linspace(0, len(xs) - 1, min(len(xs), _TABLE_ROWS)).round().astype(int)
        columns = [dict(zip(curve.x, curve.y, strict=True)) for curve in self.curves]
        rows = [
            [spell(x), *(spell(ys[x]) if x in ys else "" for ys in columns)]
            for x in (xs[at] for at in kept)
        ]
        head = [self.x_label, *(curve.name for curve in self.curves)]
        return f"{self.title}: {len(rows)} of {len(xs)} points", head, rows

    def drawings(self, name: str) -> list[tuple[str, str]]:
        """(class, SVG) of each size; `name` tells its ids from others'. The page shows the one
        that fits; there is none where nothing is finite."""
        sizes = {"small": _SMALL, "large": _WIDE} if self.wide else {"": _SMALL}
        return [(s, draw(self, f"{name}{s}", sizes[s])) for s in sizes if self.range is not None]


# ---- which charts there are ------------------------------------------------------------------


def step_charts(runs: Sequence[Run]) -> tuple[list[Chart], list[Chart]]:
    """Those of metrics that we know, loss first, and those that another recipe logged."""
    drawn = {*_METRICS, *(f"eval_{key}" for key in _METRICS)}
    names = dict.fromkeys(key for run in runs for key in run.metrics if key not in drawn)
    others = [_over_steps(key, runs) for key in list(names)[:_MOST_OTHER_METRICS]]
    return [chart for key in _METRICS if (chart := _over_steps(key, runs)).curves], others


def _over_steps(metric: str, runs: Sequence[Run]) -> Chart:
    """One colour per run; one per curve where there is one run."""
    title, unit, options = _METRICS.get(metric, (metric, "", {}))
    pairs = [run.compares_pairs for run in runs]
    if metric == "loss" and any(pairs):
        unit = "nats per pair" if all(pairs) else "nats per token, or per pair"
    evaluated = metric in _METRICS and any(f"eval_{metric}" in run.metrics for run in runs)
    curves = []
    for index, run in enumerate(runs):
        for kind, key in enumerate((metric, f"eval_{metric}") if evaluated else (metric,)):
            if key not in run.metrics:
                continue
            name, color = run.name + (" (evaluation)" if kind else ""), index
            if len(runs) == 1:
                name, color = ("training", "evaluation")[kind] if evaluated else title, kind
            dots = kind == 1 and len(run.metrics[key][0]) <= _DOTS_UP_TO
            curves.append(Curve(name, *run.metrics[key], color, dots))
    marks = sorted({step for run in runs for step in run.resumed_at()})[-_MOST_MARKS:]
    return Chart(title, unit, curves, marks=marks, **options)


def layer_charts(runs: Sequence[Run], layers: Sequence[LayerFigures]) -> Iterator[Chart]:
    """Updates of every run; quantization errors once for runs that share them."""
    drawn: list[dict[str, float]] = []
    for run, figures in zip(runs, layers, strict=True):
        of = "" if len(runs) == 1 else f" of {run.name}"
        norms = {slot: one.norm for slot, one in figures.weights.items() if one.norm > 0}
        relative = {s: update / norms[s] for s, update in figures.updates.items() if s in norms}
        if relative:
            yield _over_layers(f"Adapter update{of}", "|scaling·B·A| / |W|", relative, True)
        elif figures.updates:
            yield _over_layers(f"Adapter update{of}", "|scaling·B·A|", figures.updates, True)
        errors = {slot: one.relative_error for slot, one in figures.weights.items()}
        known = {slot: error for slot, error in errors.items() if error is not None}
        if known and known not in drawn:
            drawn.append(known)
            yield _over_layers(f"Quantization error{of}", "|W - NF4(W)| / |W|", known, False)


def _over_layers(title: str, unit: str, values: dict[str, float], from_zero: bool) -> Chart:
    """One curve per projection, in the same colour in every chart; what lies in no layer is told
    in words."""
    found: dict[str, dict[int, float]] = {name: {} for name in PROJECTIONS}
    about = "Frobenius norms"
    for slot, value in values.items():
        match = re.fullmatch(r"layers\.(\d{1,6})\.(?:.+\.)?(.+)", slot)
        if match:
            found.setdefault(match[2], {})[int(match[1])] = value
        else:
            about += f"; {slot}: {spell(value)}"
    curves = [
        Curve(name, list(points), list(points.values()), index, len(points) <= _DOTS_UP_TO)
        for index, (name, points) in enumerate(found.items())
        if points
    ]
    return Chart(title, unit, curves, x_label="layer", about=about, from_zero=from_zero)


# ---- drawing ---------------------------------------------------------------------------------

# Colours that stand for those of the page: number N becomes var(--cN), and these two
_LINE, _SOFT = "#fc00f0", "#fc00f1"
_VARIABLES = {"f0": "line", "f1": "soft"}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],  # what matplotlib brings, to measure with
    "font.size": 11,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _SOFT,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.xmargin": 0.02,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _LINE,
    "lines.solid_capstyle": "round",
}
for _axis in ("xtick", "ytick"):
    _STYLE |= {f"{_axis}.color": _LINE, f"{_axis}.labelcolor": _SOFT}
    _STYLE |= {f"{_axis}.major.size": 0, f"{_axis}.minor.size": 0}


def draw(chart: Chart, name: str, size: tuple[int, int]) -> str:
    """An SVG element without a word of the run's in it; the same chart gives the same one."""
    import matplotlib.style
    from matplotlib.figure import Figure

    style: Any = ["default", {**_STYLE, "svg.hashsalt": name}]  # whatever a matplotlibrc says
    with matplotlib.style.context(style):
        width, height = size
        figure = Figure(figsize=(width / 72, height / 72))
        figure.subplots_adjust(52 / width, 36 / height, 1 - 10 / width, 1 - 8 / height)
        _plot(figure.add_subplot(xlabel=chart.x_label), chart)
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=nothing)
    return _for_the_page(file.getvalue())


def _plot(axes: Any, chart: Chart) -> None:
    from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, NullFormatter

    if chart.is_log:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_ROUND))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: spell(value)))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=_ROUND, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    steps = [step for curve in chart.curves if curve.x for step in (curve.x[0], curve.x[-1])]
    for mark in (mark for mark in chart.marks if min(steps) <= mark <= max(steps)):
        axes.axvline(mark, color=_SOFT, linewidth=1, linestyle=":")
    limit = max(100, _MOST_POINTS // max(4, len(chart.curves)))
    for curve in chart.curves:
        x, y = thin_out(np.asarray(curve.x, float), np.asarray(curve.y, float), limit)
        smooth = chart.is_smooth(curve)
        style = {
            "color": f"#fc000{curve.color % NUM_COLORS}",
            "linestyle": "-" if curve.color < NUM_COLORS else "--",
            "clip_on": False,  # what lies on the axis is drawn whole
        }
        gaps = np.isnan(np.concatenate([[np.nan], y, [np.nan]]))
        alone = np.flatnonzero(~gaps[1:-1] & gaps[:-2] & gaps[2:])  # points that no line goes to
        axes.plot(
            x,
            y,
            alpha=0.35 if smooth else None,
            linewidth=1 if smooth or curve.dots else 1.75,
            marker="o",
            markersize=4 if curve.dots else 1.75,
            markevery=None if curve.dots else alone.tolist(),
            **style,
        )
        if smooth:
            axes.plot(*averages(curve), linewidth=1.75, **style)
    if chart.from_zero and chart.range and chart.range[0] >= 0:
        axes.set_ylim(bottom=0)


def _for_the_page(svg: str) -> str:
    """Inside HTML: no prolog and no style for all of the page, the page's colours, no id that
    nothing refers to, and no more digits than there are pixels."""
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg[svg.index("<svg") :])
    svg = re.sub(r"#fc00(..)", lambda m: f"var(--{_VARIABLES.get(m[1], f'c{m[1][1]}')})", svg)

    def shorter(path: re.Match[str]) -> str:
        return re.sub(r"(\.\d)\d+", r"\1", path[0].replace(" \n", ""))

    return re.sub(r' d="[^"]*"', shorter, svg)


def thin_out(
    x: NDArray[np.float64], y: NDArray[np.float64], limit: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """About `limit` points: both ends, and of each stretch the lowest, the highest, and the first
    that is not finite."""
    if len(x) <= limit:
        return x, y
    kept = {0, len(x) - 1}
    for stretch in np.array_split(np.arange(len(x)), limit // 2):
        finite, gap = (stretch[np.isfinite(y[stretch]) == wanted] for wanted in (True, False))
        if len(finite):
            kept |= {int(finite[y[finite].argmin()]), int(finite[y[finite].argmax()])}
        kept |= set(gap[:1].tolist())
    order = sorted(kept)
    return x[order], y[order]


def averages(curve: Curve) -> tuple[list[float], list[float]]:
    """The mean of what is finite in each stretch of the curve, at the stretch's middle."""
    count = max(1, min(100, len(curve.x) // 5))
    xs, ys = (np.array_split(np.asarray(each, float), count) for each in (curve.x, curve.y))
    finite = [y[np.isfinite(y)] for y in ys]
    return [x.mean() for x in xs], [y.mean() if len(y) else math.nan for y in finite]


def spell(value: float) -> str:
    """A number as a person would write it: four digits, and a power of ten only where needed."""
    if not math.isfinite(value):
        return str(value)
    if value == round(value) and abs(value) < 1e6:
        return f"{value + 0.0:,.0f}"  # no minus before zero
    if not 1e-3 <= abs(value) < 1e6:
        mantissa, _, exponent = f"{value:.3g}".partition("e")
        return f"{mantissa}e{int(exponent)}" if exponent else mantissa
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:,.4g}"
