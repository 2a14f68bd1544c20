"""What a process says on a terminal, and hears from it.

Text of files is shown as it is: markup in it means nothing, nothing acts on the terminal.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
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


def table_console() -> PlainConsole:
    """Where it is no terminal, and COLUMNS is not set, 140 columns wide: rich would take 80."""
    console = PlainConsole(soft_wrap=True)
    if console.is_terminal or "COLUMNS" in os.environ:
        return console
    return PlainConsole(soft_wrap=True, width=140)


# value -> everybody's values, by rank: how the processes of a run agree
Gather = Callable[[Any], list[Any]]


def alone(value: Any) -> list[Any]:
    return [value]


class StopRequest:
    """Set by the first SIGINT or SIGTERM: finish the step, save, leave."""

    def __init__(self, gather: Gather = alone) -> None:
        self.signal_number: int | None = None
        self._gather = gather

    def __bool__(self) -> bool:
        return self.signal_number is not None

    def agreed(self) -> bool:
        """Whether it is set on any rank, and then on all; all ranks must call it."""
        number = next((n for n in self._gather(self.signal_number) if n is not None), None)
        if number is not None:
            self.signal_number = number
        return number is not None

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, as shells expect; 0 after SIGTERM, a stop that a scheduler planned."""
        return 128 + signal.SIGINT if self.signal_number == signal.SIGINT else 0


@contextmanager
def stop_on_signal(gather: Gather = alone) -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request; the second one acts at once.

    At once is an exception, so that files and the terminal are left in order; a third signal that
    comes before that is done ends the process as if nobody had asked for it.
    """
    request = StopRequest(gather)
    numbers = (signal.SIGINT, signal.SIGTERM)

    def note(number: int, _frame: FrameType | None) -> None:
        request.signal_number = number
        if os.environ.get("RANK", "0") == "0":  # a print could meet another in the middle
            os.write(2, b"\nfinishing this step, then saving; the same again leaves at once\n")
        for other in numbers:
            signal.signal(other, leave)

    def leave(number: int, _frame: FrameType | None) -> None:
        for other in numbers:
            signal.signal(other, signal.SIG_DFL)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    previous = {number: signal.signal(number, note) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
