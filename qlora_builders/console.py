"""rich's console for text of files: markup in it means nothing, nothing acts on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from qlora_builders.visible import visible

T = TypeVar("T")


class PlainConsole(Console):
    """Every string that it is given, in cells of tables too, is shown as it is written."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)

    def track(self, items: Iterable[T], what: str, total: int) -> Iterable[T]:
        """The items, with a bar on a terminal while they are taken."""
        disable = not self.is_terminal
        return track(items, what, total, console=self, transient=True, disable=disable)


def plain_table(texts: Sequence[str], figures: Sequence[str], **options: Any) -> Table:
    """An empty table with columns of text, then of figures; `options` are rich's."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, **options)
    for name in texts:
        table.add_column(name, no_wrap=True)
    for name in figures:
        table.add_column(name, justify="right", no_wrap=True)
    return table
