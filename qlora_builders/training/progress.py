"""Where a run reports: metrics.jsonl, a progress bar or plain lines, a plot of the losses."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qlora_builders.errors import optional_import

METRICS_FILE = "metrics.jsonl"
_SECONDS_BETWEEN_LINES = 10.0


class MetricsLog:
    """One JSON object per line, on disk as soon as it is written."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / METRICS_FILE

    def write(self, **values: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")


class ProgressReport:
    """A live bar on a terminal; elsewhere a line now and then, and one at the end.

    Use as a context manager around the loop.
    """

    def __init__(self, total_steps: int, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.total_steps = total_steps
        self._last_line = 0.0
        self._started = 0.0
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}"),
            TextColumn("eta"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=self.console) if self.console.is_terminal else None
        self._task = self._bar.add_task("", total=total_steps, figures="") if self._bar else None

    def __enter__(self) -> ProgressReport:
        self._started = time.monotonic()
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

    def step(
        self, step: int, *, loss: float, lr: float, tokens_per_s: float, memory: float
    ) -> None:
        """Show step `step` of the run (1 is the first); memory in MiB."""
        figures = f"loss {loss:.4f}  lr {lr:.2e}  {tokens_per_s:,.0f} tok/s  {memory:,.0f} MiB"
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=step, figures=figures)
            return
        now = time.monotonic()
        if step in (1, self.total_steps) or now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            eta = (now - self._started) / step * (self.total_steps - step)
            self.say(f"step {step}/{self.total_steps}  {figures}  eta {eta:.0f} s")

    def say(self, text: str) -> None:
        """A line above the bar."""
        self.console.print(text)


def plot_losses(directory: Path) -> Path:
    """Draw loss.png from metrics.jsonl; returns its path.

    Raises:
        ImportError: without matplotlib; the message names the extra `plot`.
    """
    optional_import("matplotlib", "plot")
    figure_module = optional_import("matplotlib.figure", "plot")
    rows = [json.loads(line) for line in (directory / METRICS_FILE).read_text().splitlines()]
    figure = figure_module.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss per token (nats)")
    for key, style in (("loss", "-"), ("eval_loss", "o-")):
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=key, linewidth=1, markersize=4)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    path = directory / "loss.png"
    figure.savefig(path, dpi=130)
    return path
