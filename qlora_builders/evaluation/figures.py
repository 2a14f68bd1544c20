"""Figures of models beside each other, with what chance alone makes of their differences.

All models see the same rows, questions and documents, so the differences are taken of each of these
and then averaged. What makes one row harder than another drops out, and the standard error is that
of the difference rather than of two figures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from qlora_builders.training.objectives import mean_and_error


@dataclass(frozen=True)
class Figure:
    """One number about a model.

    Attributes:
        value: the number.
        parts, weights: of every row, answer or document: what adds up to it; as for
            `mean_and_error`. Both are empty where it is no mean of such parts.
        is_share: the parts are right (1) or wrong (0).
    """

    value: float
    parts: Sequence[float] = ()
    weights: Sequence[float] = ()
    is_share: bool = False

    @property
    def error(self) -> float | None:
        """The standard error; None if there is none to tell."""
        return _error(self.parts, self.weights, is_share=self.is_share)


Figures = Mapping[str, Figure]


def mean_figure(parts: Sequence[float], weights: Sequence[float]) -> Figure:
    return Figure(mean_and_error(parts, weights)[0], parts, weights)


def share_figure(right: Sequence[bool]) -> Figure:
    return replace(mean_figure([float(one) for one in right], [1] * len(right)), is_share=True)


def difference(ours: Figure, theirs: Figure) -> tuple[float, float | None]:
    """(ours - theirs, its standard error), paired by part; None where either has no parts."""
    value = ours.value - theirs.value
    if not (ours.parts and theirs.parts):
        return value, None
    parts = [a - b for a, b in zip(ours.parts, theirs.parts, strict=True)]
    return value, _error(parts, ours.weights, is_share=ours.is_share)


def _error(
    parts: Sequence[float], weights: Sequence[float], *, is_share: bool = False
) -> float | None:
    """Of a share it is at least half the width of Wilson's interval for 0 of n (z = 1): n answers
    that are all wrong, or all alike, do not say that the next one is."""
    error = mean_and_error(parts, weights)[1] if weights else math.inf
    if is_share:
        error = max(error, 0.5 / (len(parts) + 1))
    return error if math.isfinite(error) else None


def differences(models: Mapping[str, Figures]) -> list[dict[str, Any]]:
    """Each of the models and each one before it, for JSON."""
    found = []
    for before, name in combinations(models, 2):
        pairs = {
            key: difference(figure, models[before][key]) for key, figure in models[name].items()
        }
        figures = {
            key: {"difference": value, "standard_error": error}
            for key, (value, error) in pairs.items()
        }
        found.append({"of": name, "from": before, "figures": figures})
    return found


def figure_table(figures: Figures) -> Table:
    """The figures of one model."""
    return _table(["value"], {key: [_cell(f.value, f.error)] for key, f in figures.items()})


def comparison_table(models: Mapping[str, Figures], against: Mapping[str, str]) -> Table:
    """A row per figure: every model, then every model minus the one named in `against`."""
    pairs = [f"{name}\n- {other}" for name, other in against.items()]
    rows = {}
    for key in next(iter(models.values())):
        figures = {name: model[key] for name, model in models.items()}
        values = [_cell(figure.value, figure.error) for figure in figures.values()]
        changes = [difference(figures[name], figures[other]) for name, other in against.items()]
        rows[key] = values + [_cell(*change, sign="+") for change in changes]
    return _table([*models, *pairs], rows)


def _cell(value: float, error: float | None, sign: str = "") -> str:
    """Two digits of the error, and of the value those that it leaves certain and two more."""
    if error is None:
        return f"{value:{sign}.4f}"
    digits = min(8, max(0, 1 - math.floor(math.log10(error)))) if error else 4
    return f"{value:{sign}.{digits}f}\n± {error:.{digits}f}"


def _table(columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> Table:
    told = any("±" in cell for cells in rows.values() for cell in cells)
    caption = "±: standard error" if told else None
    table = Table(box=SIMPLE_HEAD, pad_edge=False, caption=caption)
    table.add_column("", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for key, cells in rows.items():
        table.add_row(key, *cells)
    return table
