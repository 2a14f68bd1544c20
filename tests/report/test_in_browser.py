"""The page in a real browser, where there is one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browser import EXECUTABLE, Browser
from report_pages import training_rows

from qlora_builders.report import read_run, write_report

pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason="there is no chromium")

BOXES = """[...document.querySelectorAll('.plot')].map(plot => {
    const box = plot.getBoundingClientRect();
    const curve = plot.querySelector('path[data-x]').getBoundingClientRect();
    return {x: box.x, y: box.y, width: box.width, height: box.height,
            curve: [curve.width, curve.height], folded: !plot.checkVisibility()};
})"""
COLORS = "getComputedStyle(document.body).backgroundColor"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as found:
        yield found


@pytest.fixture
def page(make_run: Callable[..., Path], tmp_path: Path) -> Path:
    one = make_run("one", training_rows(30), {"data": {"train": "a-long-path/" * 20}})
    two = make_run("two-with-a-name-that-is-too-long-for-a-phone", training_rows(40))
    sample = {"step": 0, "prompt": "<img src=x onerror=alert(1)>" * 5, "answer": "w" * 300}
    (one / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    return write_report([read_run(one), read_run(two)], tmp_path / "report.html")


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_plots_are_there_and_nothing_goes_wrong(
    browser: Browser, page: Path, width: int, dark: bool
) -> None:
    browser.problems.clear()
    browser.requests.clear()
    browser.open(page, width=width, height=800, dark=dark)
    boxes = [box for box in browser.evaluate(BOXES) if not box["folded"]]
    assert len(boxes) == 5
    for box in boxes:
        assert box["width"] > 250
        assert box["height"] > 150
        assert box["curve"][0] > 0.5 * box["width"]  # 30 of 40 steps
        assert 0 <= box["x"] <= box["x"] + box["width"] <= width
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.evaluate(COLORS) == ("rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)")
    assert browser.problems == []
    assert browser.requests == [page.resolve().as_uri()]


def test_values_are_read_with_the_pointer_and_with_keys(browser: Browser, page: Path) -> None:
    browser.open(page, width=1280, height=800)
    text = "document.querySelector('.readout')?.textContent ?? null"
    box = browser.evaluate(BOXES)[0]
    assert browser.evaluate(text) is None
    height = browser.evaluate("document.documentElement.scrollHeight")
    browser.move_pointer(box["x"] + 0.5 * box["width"], box["y"] + 10)
    shown = browser.evaluate(text)
    assert shown.startswith("step 2")
    assert "one: " in shown
    assert "two-with-a-name-that-is-too-long-for-a-phone: " in shown
    browser.move_pointer(1, 1)
    assert browser.evaluate(text) is None
    browser.evaluate("document.querySelector('.plot').focus()")
    for _ in range(3):
        browser.press("ArrowRight")
    assert browser.evaluate(text).startswith("step 3")
    assert browser.evaluate("document.documentElement.scrollHeight") == height


def test_the_policy_stops_a_script_that_is_not_ours(
    browser: Browser, page: Path, tmp_path: Path
) -> None:
    """What escaping keeps out could not run either."""
    broken = tmp_path / "broken.html"
    inject = "<script>document.title = 'owned'</script><img src='file:///x.png'>"
    broken.write_text(page.read_text().replace("<main>", f"<main>{inject}"))
    browser.problems.clear()
    browser.open(broken, width=800, height=600)
    assert browser.evaluate("document.title") == "2 runs · qlora report"
    assert any("Content Security Policy" in problem for problem in browser.problems)
