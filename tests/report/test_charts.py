"""Charts: what is drawn where, and that nothing a run logs can break a drawing."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from qlora_builders.report.charts import Chart, Curve, averages, draw, spell, thin_out

SIZE = (360, 215)


def drawn(chart: Chart) -> ElementTree.Element:
    return ElementTree.fromstring(draw(chart, "c", SIZE))


def lines(chart: Chart, color: str = "--c0") -> list[list[tuple[float, float]]]:
    """The points of each stroke of a colour."""
    found = []
    for path in drawn(chart).iter("{http://www.w3.org/2000/svg}path"):
        if f"stroke: var({color})" in path.get("style", "") and "L" in path.get("d", ""):
            for part in path.get("d", "").split("M")[1:]:
                numbers = [float(n) for n in re.findall(r"-?[\d.]+", part)]
                found.append(list(zip(numbers[::2], numbers[1::2], strict=True)))
    return found


def labels(chart: Chart) -> list[str]:
    return [text.text or "" for text in drawn(chart).iter("{http://www.w3.org/2000/svg}text")]


def test_points_are_where_the_axes_say() -> None:
    chart = Chart("t", "", [Curve("a", [0, 5, 10], [0.0, 20.0, 10.0])], from_zero=True)
    ((start, top, end),) = lines(chart)
    assert top[0] - start[0] == pytest.approx(end[0] - top[0], abs=0.2)
    assert start[1] - end[1] == pytest.approx(end[1] - top[1], abs=0.2)
    assert start[1] == pytest.approx(SIZE[1] - 36, abs=0.2)  # zero is the axis
    assert labels(chart) == ["0", "2", "4", "6", "8", "10", "step", "0", "5", "10", "15", "20"]


def test_the_line_is_broken_where_a_value_is_not_finite() -> None:
    curve = Curve("a", [1, 2, 3, 4, 5, 6, 7], [1.0, 2.0, math.nan, 2.0, math.nan, 1.0, 1.0])
    assert [len(part) for part in lines(Chart("t", "", [curve]))] == [2, 1, 2]
    for one in (curve, Curve("a", [1], [1.0])):  # a point alone is marked
        assert draw(Chart("t", "", [one]), "c", SIZE).count("<use ") == 1


def test_a_wide_range_is_logarithmic_where_asked() -> None:
    curve = Curve("a", [0, 1, 2], [1e-2, 1.0, 1e2])
    (((_, low), (_, middle), (_, high)),) = lines(Chart("t", "", [curve], log=True))
    assert low - middle == pytest.approx(middle - high, abs=0.2)
    assert {"0.01", "1", "100"} <= set(labels(Chart("t", "", [curve], log=True)))
    assert Chart("t", "", [curve], log=True).note == "logarithmic axis"
    for values in ([1.0, 50.0], [0.0, 1e9], [5e-324, 1e299]):
        assert not Chart("t", "", [Curve("a", [0, 1], values)], log=True).is_log


STRANGE = [
    Curve("a", [3], [1.0]),
    Curve("a", [1, 2], [0.0, 0.0]),
    Curve("a", [1, 2], [1.0, 1 + 2**-52]),
    Curve("a", [1, 2, 3], [-1e300, 1e300, math.nan]),
    Curve("a", [1, 2], [5e-324, 1e300]),
    Curve("a", [1, 2], [5e-324, 5e-324]),
    Curve("a", [0, 10**15, 10**15 + 1], [1.0, 2.0, 3.0]),
    Curve("a", range(200), [1e300, -1e300, math.nan, 0] * 50),
    Curve("a", range(100_000), [math.nan, 1.0] * 50_000),
]


@pytest.mark.parametrize("curve", STRANGE)
@pytest.mark.parametrize("options", [{}, {"log": True, "from_zero": True, "smooth": True}])
def test_strange_curves_are_drawn(curve: Curve, options: dict[str, bool]) -> None:
    chart = Chart("t", "", [curve], **options)  # type: ignore[arg-type]
    ((_, svg),) = chart.drawings("c")
    assert len(svg) < 100_000
    for part in lines(chart):
        assert all(0 <= x <= SIZE[0] and 0 <= y <= SIZE[1] for x, y in part)


@pytest.mark.parametrize("values", [[], [math.nan, math.nan]])
def test_nothing_finite_is_said_in_words(values: list[float]) -> None:
    chart = Chart("t", "", [Curve("a", range(len(values)), values)], log=True, smooth=True)
    assert chart.drawings("c") == []
    assert chart.note == "no finite value"


def test_drawings_repeat_share_no_ids_and_leave_matplotlib_as_it_was() -> None:
    before = dict(matplotlib.rcParams)
    chart = Chart("t", "", [Curve("a", [1, 2], [1.0, 2.0], dots=True)], wide=True)
    ids = [re.findall(r' id="(.*?)"', svg) for _, svg in chart.drawings("c")]
    assert chart.drawings("c") == chart.drawings("c")
    assert len({*ids[0], *ids[1]}) == len(ids[0]) + len(ids[1]) > 0
    for _, svg in chart.drawings("c"):
        assert set(re.findall(r'href="#(.*?)"|url\(#(.*?)\)', svg)) <= {
            pair for id in re.findall(r' id="(.*?)"', svg) for pair in ((id, ""), ("", id))
        }
        assert re.findall("<(?:style|metadata|script|!)", svg) == []
    assert dict(matplotlib.rcParams) == before


def test_colours_come_again_dashed() -> None:
    curves = [Curve(str(i), [1, 2], [1.0, 2.0], color=i) for i in range(10)]
    svg = draw(Chart("t", "", curves), "c", SIZE)
    assert svg.count("stroke: var(--c1)") - svg.count("stroke: var(--c2)") == 1
    assert svg.count("stroke-dasharray") == 2


def test_long_curves_get_averages_without_lag() -> None:
    x, y = averages(Curve("a", range(1000), [2.0 * i for i in range(1000)]))
    assert len(x) == 100
    assert y == pytest.approx([2 * at for at in x])
    assert averages(Curve("a", range(10), [1, math.nan, 3, 4, 7] + [math.inf] * 5))[1] == (
        pytest.approx([3.75, math.nan], nan_ok=True)
    )
    chart = Chart(
        "t", "", [Curve("a", range(500), [float(i % 2) for i in range(500)])], smooth=True
    )
    assert [len(line) for line in lines(chart)][-1] == 100
    assert chart.note == "thin: as logged, bold: averages"


def test_thinning_keeps_ends_extremes_and_gaps() -> None:
    y = np.random.default_rng(0).normal(size=100_000)
    y[31_415], y[92_653], y[50_000] = 50.0, -50.0, math.nan  # one step each
    x, thin = thin_out(np.arange(100_000.0), y, 600)
    assert len(x) <= 603
    assert {0, 31_415, 50_000, 92_653, 99_999} <= set(x)
    assert np.array_equal(x, np.unique(x))
    assert np.array_equal(thin, y[x.astype(int)], equal_nan=True)
    assert len(thin_out(x, thin, len(x))[0]) == len(x)


def test_a_chart_is_told_in_words_and_numbers() -> None:
    chart = Chart("Loss", "nats", [Curve("train", range(1, 1001), [1 / i for i in range(1, 1001)])])
    assert chart.description == "Loss over step. train: last 0.001, from 0.001 to 1"
    caption, head, rows = chart.values
    assert (caption, head, len(rows)) == ("Loss: 40 of 1000 points", ["step", "train"], 40)
    assert (rows[0], rows[-1]) == (["1", "1"], ["1,000", "0.001"])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (12345, "12,345"),
        (0.123456, "0.1235"),
        (2e-4, "0.0002"),
        (2e-5, "2e-5"),
        (1.5e7, "1.5e7"),
        (123456.7, "123,457"),
        (1e6, "1e6"),
        (math.nan, "nan"),
    ],
)
def test_numbers_are_spelled_short(value: float, text: str) -> None:
    assert spell(value) == text
