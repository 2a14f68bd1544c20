"""A mean and its standard error."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from qlora_builders.training.objectives import mean_and_error


def test_equal_weights_give_the_usual_error_of_a_mean() -> None:
    values = [0.0, 1.0, 1.0, 0.5, -2.0]
    mean, error = mean_and_error(values, [1] * 5)
    assert mean == pytest.approx(statistics.mean(values))
    assert error == pytest.approx(statistics.stdev(values) / math.sqrt(5))


def test_rows_of_many_lengths_give_the_spread_of_repeated_draws() -> None:
    """The loss per token of 200 rows, drawn 2000 times."""
    draw = random.Random(0)

    def rows() -> tuple[list[float], list[int]]:
        lengths = [draw.randint(1, 60) for _ in range(200)]
        hardness = [draw.gauss(2, 0.5) for _ in lengths]
        return [h * n for h, n in zip(hardness, lengths, strict=True)], lengths

    found = [mean_and_error(*rows()) for _ in range(2000)]
    spread = statistics.stdev(mean for mean, _ in found)
    assert statistics.mean(error for _, error in found) == pytest.approx(spread, rel=0.05)
    assert statistics.mean(mean for mean, _ in found) == pytest.approx(2, abs=0.01)


def test_a_single_part_says_nothing_about_chance() -> None:
    assert mean_and_error([3.0], [2]) == (1.5, math.inf)
