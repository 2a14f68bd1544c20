"""The page in a real browser, where there is one: in a frame whose owner looks into it."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_pages import training_rows

from qlora_builders.report import read_run, write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")

FRAME = """<iframe src="report.html" style="border: 0; width: WIDTHpx; height: 800px"></iframe>
<pre></pre><script>
const frame = document.querySelector('iframe');
frame.onload = () => {
  const page = frame.contentDocument, boxes = [...page.querySelectorAll('svg')]
    .filter(svg => svg.checkVisibility()).map(svg => svg.getBoundingClientRect());
  document.querySelector('pre').textContent = JSON.stringify({
    title: page.title, width: page.documentElement.scrollWidth,
    boxes: boxes.map(box => [box.left, box.right, box.height]),
    background: frame.contentWindow.getComputedStyle(page.body).backgroundColor,
    line: frame.contentWindow.getComputedStyle(page.querySelector('[style*="--c0"]')).stroke,
    fetched: frame.contentWindow.performance.getEntriesByType('resource').length,
  });
};
</script>"""


def looked_at(page: Path, width: int, *options: str) -> dict[str, Any]:
    owner = page.with_name("owner.html")
    owner.write_text(FRAME.replace("WIDTH", str(width)))
    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--hide-scrollbars", *options]
    local = ["--allow-file-access-from-files", f"--user-data-dir={page.parent / 'profile'}"]
    ended = subprocess.run(
        [*command, *local, "--virtual-time-budget=10000", "--dump-dom", owner.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search("<pre>(.*)</pre>", ended.stdout)
    assert found, ended.stderr
    result: dict[str, Any] = json.loads(html.unescape(found[1]))
    return result


@pytest.fixture
def page(make_run: Callable[..., Path], tmp_path: Path) -> Path:
    one = make_run("one", training_rows(30), {"data": {"train": "a-long-path/" * 20}})
    two = make_run("two-with-a-name-that-is-too-long-for-a-phone", training_rows(40))
    sample = {"step": 0, "prompt": "<img src=x onerror=alert(1)>" * 5, "answer": "w" * 300}
    (one / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    return write_report([read_run(one), read_run(two)], tmp_path / "report.html")


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_charts_fit_and_nothing_is_fetched(page: Path, width: int, dark: bool) -> None:
    seen = looked_at(page, width, *(["--force-dark-mode"] if dark else []))
    assert seen["width"] == width
    assert len(seen["boxes"]) == 5
    for left, right, height in seen["boxes"]:
        assert 0 <= left <= left + 250 <= right <= width
        assert height > 150
    assert seen["background"] == ("rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)")
    assert seen["line"] == ("rgb(88, 166, 255)" if dark else "rgb(9, 105, 218)")
    assert seen["fetched"] == 0


def test_the_policy_stops_what_escaping_would_let_through(page: Path) -> None:
    inject = "<script>document.title = 'owned'</script>"
    for policy, title in (("default-src", "2 runs · qlora report"), ("no-src", "owned")):
        text = page.read_text().replace("default-src", policy)
        page.write_text(text.replace("<main>", f"<main>{inject}", 1))
        assert looked_at(page, 800)["title"] == title
        inject = ""
