"""Thinning, smoothing, axes and numbers."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import numpy as np
import pytest

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


def test_thinning_keeps_ends_and_extremes() -> None:
    rng = random.Random(0)
    y = [rng.gauss(0, 1) for _ in range(100_000)]
    y[31_415], y[92_653] = 50.0, -50.0  # one step each
    thin = thin_out(Series("a", range(len(y)), y), 600)
    assert len(thin.x) <= 600
    assert (thin.x[0], thin.x[-1]) == (0, 99_999)
    assert {31_415, 92_653} <= set(thin.x)
    assert list(thin.x) == sorted(set(thin.x))
    assert all(y[int(x)] == value for x, value in zip(thin.x, thin.y, strict=True))


def test_thinning_keeps_a_gap() -> None:
    y = [1.0] * 5000
    y[1234] = math.nan
    thin = thin_out(Series("a", range(5000), y), 100)
    assert 1234 in thin.x
    assert sum(map(math.isnan, thin.y)) == 1


def test_short_series_are_left_alone() -> None:
    short = Series("a", [1, 2], [3.0, math.nan])
    assert thin_out(short, 2) is short


def test_smoothing_is_the_mean_of_the_neighbours() -> None:
    values = np.random.default_rng(0).normal(size=50)
    result = smoothed(values.tolist(), 8)
    reach = [max(2, min(8, i, 49 - i)) for i in range(50)]
    expected = [values[max(0, i - n) : i + n + 1].mean() for i, n in enumerate(reach)]
    assert result == pytest.approx(expected)
    line = [2.0 * i for i in range(20)]
    assert smoothed(line, 4)[1:-1] == pytest.approx(line[1:-1])  # no lag


def test_smoothing_leaves_out_what_is_not_finite() -> None:
    assert smoothed([1.0, math.nan, 3.0], 1) == [1.0, 2.0, 3.0]
    assert math.isnan(smoothed([math.inf], 4)[0])


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0.1, 0.31, [0.1, 0.15, 0.2, 0.25, 0.3]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
        (1e-5, 2e-4, [5e-5, 1e-4, 1.5e-4, 2e-4]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 5e-324), (1.0, 1 + 2**-52), (-1e300, 1e300), (1e15, 1e15 + 3)]
)
def test_ticks_of_strange_ranges_stay_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 1 <= len(found) <= 8
    width = high - low
    assert all(low - width <= tick <= high + width for tick in found)
    assert all(a <= b for a, b in pairwise(found))


def test_log_ticks_are_powers_of_ten() -> None:
    assert log_ticks(-2.1, 1.3) == [-2, -1, 0, 1]
    assert len(log_ticks(-30, 30)) <= 7


def test_bounds() -> None:
    flat = [Series("a", [1], [5.0])]
    assert bounds(flat, from_zero=False) == (2.5, 7.5)
    assert bounds([Series("a", [1], [math.nan])], from_zero=True) == (0, 1)
    both = [Series("a", [1, 2], [1.0, math.inf]), Series("b", [1], [3.0])]
    assert bounds(both, from_zero=False) == pytest.approx((0.9, 3.1))
    assert bounds(both, from_zero=True) == pytest.approx((0, 3.15))
    assert bounds([Series("a", [1, 2], [-1.0, 1.0])], from_zero=True)[0] < -1


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1, "1"),
        (12345, "12,345"),
        (0.123456, "0.1235"),
        (2e-4, "0.0002"),
        (2e-5, "2e-5"),
        (0.00123, "0.00123"),
        (1.5e7, "1.5e7"),
        (123456.7, "123,457"),
        (1e6, "1e6"),
        (math.nan, "nan"),
    ],
)
def test_numbers_are_spelled_short(value: float, text: str) -> None:
    assert spell(value) == text


@pytest.mark.parametrize(
    ("step", "text"),
    [(0, "0"), (8000, "8,000"), (20_000, "20k"), (12_500, "12.5k"), (1_500_000, "1.5M")],
)
def test_steps_are_spelled_shorter(step: float, text: str) -> None:
    assert spell_step(step) == text
