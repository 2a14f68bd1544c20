"""The charts of a page: what is over steps, and what is over layers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from qlora_builders.report.chart import Chart, draw
from qlora_builders.report.html import element, fold
from qlora_builders.report.layers import LayerFigures
from qlora_builders.report.run import Run
from qlora_builders.report.series import Series, spell

# metric, whose evaluation is eval_METRIC -> title, unit, options of Chart
_EVALUATED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "loss": ("Loss", "nats per token", {"wide": True}),
    "rewards/margins": ("Reward margin", "nats per pair, chosen less rejected", {}),
    "rewards/accuracies": ("Reward accuracy", "share of pairs", {"from_zero": True}),
}
# metric -> title, unit, options of Chart
_CHARTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lr": ("Learning rate", "", {"from_zero": True}),
    "grad_norm": ("Gradient norm", "before clipping", {"log": True, "smooth": True}),
    "tokens_per_s": ("Throughput", "tokens/s", {"from_zero": True, "smooth": True}),
    "peak_memory_mib": ("Peak memory", "MiB", {"from_zero": True}),
}
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_DOTS_UP_TO = 40  # points of a curve that are marked one by one
_MOST_POINTS = 600  # of a curve
_MOST_POINTS_OF_ALL = 2400  # of one metric, all runs together
_MOST_OTHER_METRICS = 12


def step_section(runs: Sequence[Run]) -> Element:
    """Loss first; metrics that we do not know, which another recipe logged, folded at the end."""
    limit = max(100, min(_MOST_POINTS, _MOST_POINTS_OF_ALL // len(runs)))
    evaluated = (_evaluated(key, runs) for key in _EVALUATED)
    known = [chart for chart in (*evaluated, *(_metric(key, runs) for key in _CHARTS)) if chart]
    names = dict.fromkeys(key for run in runs for key in run.metrics)
    drawn = {*_EVALUATED, *(f"eval_{key}" for key in _EVALUATED), *_CHARTS}
    others = [key for key in names if key not in drawn]
    figures = [draw(chart, name=f"chart-{i}", limit=limit) for i, chart in enumerate(known)]
    if not figures:
        figures = [element("p", "No step has been logged yet.", class_="empty")]
    more = [
        draw(chart, name=f"metric-{i}", limit=limit)
        for i, key in enumerate(others[:_MOST_OTHER_METRICS])
        if (chart := _metric(key, runs))
    ]
    return element(
        "section",
        element("h2", "Training"),
        element("div", *figures, class_="charts"),
        fold("Other metrics", element("div", *more, class_="charts")) if more else None,
    )


def layer_section(runs: Sequence[Run], layers: Sequence[LayerFigures]) -> Element | None:
    charts = [
        draw(chart, name=f"layers-{i}", limit=_MOST_POINTS)
        for i, chart in enumerate(_layer_charts(runs, layers))
    ]
    notes = [
        element("p", note if len(runs) == 1 else f"{run.name}: {note}", class_="note")
        for run, figures in zip(runs, layers, strict=True)
        for note in figures.notes
    ]
    if not charts and not notes:
        return None
    return element(
        "section", element("h2", "Layers"), *notes, element("div", *charts, class_="charts")
    )


def _evaluated(metric: str, runs: Sequence[Run]) -> Chart | None:
    """One colour per run; one per curve where there is one run."""
    series = []
    for index, run in enumerate(runs):
        for kind, key in enumerate((metric, f"eval_{metric}")):
            if key in run.metrics:
                steps, values = run.metrics[key]
                what = ("training", "evaluation")[kind]
                single = len(runs) == 1
                name = what if single else run.name + (" (evaluation)" if kind else "")
                dots = kind == 1 and len(steps) <= _DOTS_UP_TO
                series.append(Series(name, steps, values, kind if single else index, dots))
    if not series:
        return None
    title, unit, options = _EVALUATED[metric]
    if metric == "loss" and any(run.compares_pairs for run in runs):
        alone = all(run.compares_pairs for run in runs)
        unit = "nats per pair" if alone else "nats per token, or per pair"
    return Chart(title, unit, series, marks=_resumes(runs), smooth=True, **options)


def _metric(key: str, runs: Sequence[Run]) -> Chart | None:
    title, unit, options = _CHARTS.get(key, (key, "", {}))
    series = [
        Series(title if len(runs) == 1 else run.name, *run.metrics[key], color=index)
        for index, run in enumerate(runs)
        if key in run.metrics
    ]
    return Chart(title, unit, series, marks=_resumes(runs), **options) if series else None


def _resumes(runs: Sequence[Run]) -> list[tuple[float, str]]:
    return [
        (step, f"{run.name} resumed after step {step:,}")
        for run in runs
        for step in run.resumed_at()
    ]


def _layer_charts(runs: Sequence[Run], layers: Sequence[LayerFigures]) -> Iterator[Chart]:
    """Updates of every run; quantization errors once for runs that share them."""
    drawn: list[dict[str, float]] = []
    for run, figures in zip(runs, layers, strict=True):
        of = "" if len(runs) == 1 else f" of {run.name}"
        norms = {slot: one.norm for slot, one in figures.weights.items() if one.norm > 0}
        relative = {s: update / norms[s] for s, update in figures.updates.items() if s in norms}
        if relative:
            yield _over_layers(f"Adapter update{of}", "|scaling·B·A| / |W|", relative)
        elif figures.updates:
            yield _over_layers(f"Adapter update{of}", "|scaling·B·A|", figures.updates)
        errors = {
            slot: one.relative_error
            for slot, one in figures.weights.items()
            if one.relative_error is not None
        }
        if errors and errors not in drawn:
            drawn.append(errors)
            yield _over_layers(
                f"Quantization error{of}", "|W - NF4(W)| / |W|", errors, from_zero=False
            )


def _over_layers(
    title: str, unit: str, values: dict[str, float], *, from_zero: bool = True
) -> Chart:
    """One curve per projection, in the same colour in every chart; what lies in no layer is told
    in words."""
    curves: dict[str, list[tuple[int, float]]] = {name: [] for name in _PROJECTIONS}
    rest = []
    for slot, value in values.items():
        match = re.fullmatch(r"layers\.(\d{1,6})\.(?:.+\.)?(.+)", slot)
        if match:
            curves.setdefault(match[2], []).append((int(match[1]), value))
        else:
            rest.append(f"{slot}: {spell(value)}")
    series = [
        Series(
            name,
            [layer for layer, _ in points],
            [value for _, value in points],
            color=index,
            dots=len(points) <= _DOTS_UP_TO,
        )
        for index, (name, points) in enumerate(curves.items())
        if points
    ]
    note = "Frobenius norms" + "".join(f"; {text}" for text in rest)
    return Chart(title, unit, series, x_label="layer", note=note, from_zero=from_zero)
