"""Figures of models, their differences and the tables of both."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from rich.console import Console
from rich.table import Table

from qlora_builders.evaluation import Figure, comparison_table, differences, figure_table
from qlora_builders.evaluation.measure import cell, mean_figure, share_figure

# 1 of 4, 2 of 4: alike but for one answer
BEFORE = mean_figure([1, 0, 0, 0], [1] * 4)
AFTER = mean_figure([1, 1, 0, 0], [1] * 4)


def difference(ours: Figure, theirs: Figure) -> tuple[float, float | None]:
    found = ours.minus(theirs)
    return found.value, found.error


def test_differences_are_paired() -> None:
    value, error = difference(AFTER, BEFORE)
    assert value == 0.25
    assert error == pytest.approx(statistics.stdev([0, 1, 0, 0]) / 2)
    assert difference(AFTER, AFTER) == (0, 0)
    # what all parts have in common is no noise
    harder = mean_figure([x + 5.0 for x in AFTER.parts], AFTER.weights)
    assert difference(harder, AFTER) == (5.0, 0.0)
    assert harder.error == pytest.approx(AFTER.error)


def test_a_figure_that_is_no_mean_has_a_difference_without_error() -> None:
    assert difference(Figure(3.0), Figure(1.0)) == (2.0, None)
    assert difference(AFTER, Figure(0.25)) == (0.25, None)
    assert Figure(3.0).error is None
    assert difference(mean_figure([4.0], [2]), mean_figure([2.0], [2])) == (1.0, None)


@pytest.mark.parametrize("number", [2, 20, 500])
def test_answers_that_are_all_wrong_are_not_certain(number: int) -> None:
    wrong, right = share_figure([False] * number), share_figure([True] * number)
    half_width = math.sqrt(1 / (4 * number**2)) / (1 + 1 / number)  # Wilson, z = 1, p = 0 or 1
    assert wrong.error == right.error == pytest.approx(half_width)
    assert difference(right, wrong) == (1, wrong.error)
    assert difference(wrong, wrong) == (0, wrong.error)
    some = share_figure([True, *[False] * (number - 1)])
    assert some.error == mean_figure(some.parts, some.weights).error
    assert share_figure([True]).error is None


def test_json_has_every_pair() -> None:
    models = {name: {"exact match": f} for name, f in [("a", BEFORE), ("b", AFTER), ("c", AFTER)]}
    found = differences(models)
    assert [(pair["of"], pair["from"]) for pair in found] == [("b", "a"), ("c", "a"), ("c", "b")]
    assert found[0]["figures"] == {"exact match": {"difference": 0.25, "standard_error": 0.25}}
    assert found[2]["figures"] == {"exact match": {"difference": 0, "standard_error": 0}}


def text(table: Table) -> list[str]:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table)
    return [" ".join(line.split()) for line in capture.get().splitlines()]


def test_tables() -> None:
    a, b = {"exact match": BEFORE, "f1": Figure(0.5)}, {"exact match": AFTER, "f1": Figure(0.25)}
    lines = text(comparison_table({"a": a, "b": b}, {"b": "a"}))
    at = lines.index("exact match 0.25 0.50 +0.25")
    assert lines[at + 1] == "± 0.25 ± 0.29 ± 0.25"
    assert "f1 0.5000 0.2500 -0.2500" in lines
    lines = text(figure_table(b))
    at = lines.index("exact match 0.50")
    assert lines[at + 1] == "± 0.29"
    assert "f1 0.2500" in lines


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (0.00929135, 0.0000304, "0.009291\n± 0.000030"),
        (31919.5026, 760.986, "31920\n± 761"),
        (10.3709, 0.0238, "10.371\n± 0.024"),
        (-1.0, 0.0, "-1.0000\n± 0.0000"),
        (1.0, 1e-12, "1.00000000\n± 0.00000000"),
        (0.5, None, "0.5000"),
    ],
)
def test_digits_are_those_that_the_error_leaves(
    value: float, error: float | None, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Figure, "error", error)
    assert cell(Figure(value)) == shown


def test_the_error_of_perplexity_is_that_of_repeated_draws() -> None:
    """Two models on 100 rows, drawn 2000 times; the second is better by 0.1 nats per token."""
    draw = random.Random(0)

    def figures() -> tuple[Figure, Figure]:
        lengths = [draw.randint(1, 60) for _ in range(100)]
        first = [n * draw.gauss(2, 0.3) for n in lengths]
        second = [x - n * draw.gauss(0.1, 0.1) for x, n in zip(first, lengths, strict=True)]
        return perplexity(first, lengths), perplexity(second, lengths)

    found = [difference(second, first) for first, second in (figures() for _ in range(2000))]
    spread = statistics.stdev(value for value, _ in found)
    errors = [error for _, error in found if error is not None]
    assert statistics.mean(errors) == pytest.approx(spread, rel=0.05)


def perplexity(losses: list[float], lengths: list[int]) -> Figure:
    """As `measure_rows` makes it."""
    value = math.exp(sum(losses) / sum(lengths))
    return Figure(value, [value * loss for loss in losses], lengths)
