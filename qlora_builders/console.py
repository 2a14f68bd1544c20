"""rich's console for text of files: markup in it means nothing, nothing acts on a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from qlora_builders.visible import visible


class PlainConsole(Console):
    """Every string that it is given, in cells of tables too, is shown as it is written."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)
