"""Metrics of a run that nobody trained, and a page as an HTML parser sees it."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable
from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """A page, parsed by another implementation than the one that wrote it.

    `elements` has (tag, attributes) of everything, `text` what a reader sees. Tags that do not
    nest are an error.
    """

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert self._open == [], self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))  # in SVG

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text += data + "\n"

    def all(self, tag: str, **wanted: str) -> list[dict[str, str]]:
        return [
            attributes
            for name, attributes in self.elements
            if name == tag and wanted.items() <= attributes.items()
        ]

    def tables(self) -> dict[str, list[list[str]]]:
        """Rows by caption."""
        found = {}
        for table in re.findall(r"<table.*?</table>", self.source, re.DOTALL):
            caption = re.search("<caption>(.*?)</caption>", table)
            assert caption
            rows = re.findall("<tr>(.*?)</tr>", table, re.DOTALL)
            cells = [re.findall("<t[hd].*?>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]
            found[caption[1]] = [[html.unescape(cell) for cell in row] for row in cells]
        return found


def training_rows(steps: int) -> Iterable[dict[str, Any]]:
    for step in range(1, steps + 1):
        yield {
            "step": step,
            "loss": 3 * math.exp(-step / steps),
            "lr": 1e-3 * (1 - step / steps),
            "grad_norm": 1 / step,
            "target_tokens": 100,
            "tokens_per_s": 1000.0 + step % 7,
            "step_s": 0.1,
            "peak_memory_mib": 500.0,
        }
        if step % (steps // 2) == 0:
            yield {"step": step, "eval_loss": 3.1 * math.exp(-step / steps), "eval_tokens": 50}
