"""The drawing of a chart, point by point."""

from __future__ import annotations

import math
import re
from xml.etree.ElementTree import Element

import pytest

from qlora_builders.report.chart import Chart, draw
from qlora_builders.report.series import Series


def drawn(chart: Chart, limit: int = 600) -> Element:
    return draw(chart, name="c", limit=limit)


def paths(figure: Element, kind: str) -> list[str]:
    found = [p for p in figure.iter("path") if kind in p.get("class", "").split()]
    return [path.get("d", "") for path in found]


def labels(figure: Element, axis: str) -> list[tuple[str, str]]:
    (box,) = (div for div in figure.iter("div") if div.get("class") == axis)
    return [(span.text or "", span.get("style", "")) for span in box]


def test_points_are_where_the_axes_say() -> None:
    figure = drawn(
        Chart("Loss", "nats", [Series("a", [0, 5, 10], [0.0, 20.0, 10.0])], from_zero=True)
    )
    (line,) = paths(figure, "line")
    # y runs from 0 to 21: the highest value and a margin of a twentieth
    assert line == "M0 1000L500 47.6L1000 523.8"
    assert labels(figure, "x") == [(str(2 * i), f"left:{20 * i:.2f}%") for i in range(6)]
    assert ("10", "bottom:47.62%") in labels(figure, "y")
    (box,) = (div for div in figure.iter("div") if div.get("class") == "plot")
    assert (box.get("data-x-min"), box.get("data-x-max")) == ("0", "10")


def test_the_line_is_broken_where_a_value_is_not_finite() -> None:
    series = Series("a", [1, 2, 3, 4, 5], [1.0, 2.0, math.nan, 2.0, math.inf])
    figure = drawn(Chart("t", "", [series]))
    (line,) = paths(figure, "line")
    assert re.fullmatch(r"M[\d. ]+L[\d. ]+M[\d. ]+h0", line)
    assert "nan" not in line
    assert "inf" not in line
    (path,) = (p for p in figure.iter("path") if "data-y" in p.attrib)
    assert path.get("data-y") == "1 2 nan 2 inf"


def test_a_wide_range_is_logarithmic_where_asked() -> None:
    values = Series("a", [0, 1, 2], [1e-2, 1.0, 1e2])
    linear, log = drawn(Chart("t", "", [values])), drawn(Chart("t", "", [values], log=True))
    assert paths(linear, "line") != paths(log, "line")
    (line,) = paths(log, "line")
    ys = [float(point.split()[1]) for point in line[1:].split("L")]
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.11)
    assert [text for text, _ in labels(log, "y")] == ["0.01", "0.1", "1", "10", "100"]
    narrow = Series("a", [0, 1], [1.0, 50.0])
    assert "logarithmic" not in "".join(drawn(Chart("t", "", [narrow], log=True)).itertext())


def test_few_points_get_dots_and_long_series_an_average() -> None:
    dots = drawn(Chart("t", "", [Series("a", [1, 2], [1.0, 2.0], dots=True)]))
    assert paths(dots, "points")[0].count("h0") == 2
    long = Series("a", range(500), [float(i % 2) for i in range(500)])
    figure = drawn(Chart("t", "", [long], smooth=True))
    assert len(paths(figure, "thin")) == len(paths(figure, "line")) == 1
    assert "moving average" in "".join(figure.itertext())


@pytest.mark.parametrize(
    "series",
    [
        Series("a", [], []),
        Series("a", [3], [1.0]),
        Series("a", [1, 2], [math.nan, math.nan]),
        Series("a", [1, 2], [0.0, 0.0]),
        Series("a", [1, 2], [-1e300, 1e300]),
        Series("a", [1, 2], [5e-324, 1e300]),
        Series("a", [10**15, 10**15 + 1], [1.0, 2.0]),
    ],
)
def test_strange_series_are_drawn(series: Series) -> None:
    for options in ({}, {"log": True, "from_zero": True, "smooth": True}):
        figure = drawn(Chart("t", "", [series], **options))
        numbers = re.findall(
            r"-?\d+(?:\.\d+)?", " ".join(p.get("d", "") for p in figure.iter("path"))
        )
        assert all(-1 <= float(number) <= 1001 for number in numbers)


def test_colours_come_again_dashed() -> None:
    series = [Series(str(i), [1, 2], [1.0, 2.0], color=i) for i in range(10)]
    classes = [p.get("class", "") for p in drawn(Chart("t", "", series)).iter("path")]
    assert "line c1" in classes
    assert "line c1 again" in classes


def test_the_drawing_is_described_and_its_values_are_listed() -> None:
    series = Series("train", range(1, 1001), [1 / i for i in range(1, 1001)])
    figure = drawn(Chart("Loss", "nats", [series]))
    (svg,) = figure.iter("svg")
    ids = {node.get("id"): "".join(node.itertext()) for node in svg.iter() if node.get("id")}
    assert (svg.get("role"), svg.get("aria-labelledby")) == ("img", "c-title c-desc")
    assert ids == {
        "c-title": "Loss",
        "c-desc": "Loss over step. train: last 0.001, from 0.001 to 1",
    }
    rows = [["".join(cell.itertext()) for cell in row] for row in figure.iter("tr")]
    assert rows[0] == ["step", "train"]
    assert (rows[1], rows[-1]) == (["1", "1"], ["1,000", "0.001"])
    assert len(rows) == 41
