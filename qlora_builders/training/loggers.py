"""Where metrics go beside metrics.jsonl, on request: `loggers` in a config names these classes.

    loggers: [{component: qlora_builders.training.loggers.TensorBoardLogger}]

A logger of your own is a class with `log` and `close` that takes the same three arguments, and its
package is allowed with `--allow PACKAGE`. The constructor runs before the model is loaded, so that
a missing package is told at once; files and connections are opened by the first `log`, because only
then the run directory belongs to the run.
"""

from __future__ import annotations

import itertools
import json
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qlora_builders.console import PlainConsole
from qlora_builders.errors import optional_import
from qlora_builders.files.outputs import METRICS_FILE, append_rows, write_whole
from qlora_builders.training.step import StepResult
from qlora_builders.visible import visible


class Logger(Protocol):
    """Steps never go down within a process; a resumed run starts at its checkpoint's."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoardLogger:
    """Event files in RUN/tensorboard; `tensorboard --logdir RUN` shows them.

    Of a run that goes on from a step, what was logged after that step is hidden.

    Raises ImportError without the package tensorboard.
    """

    def __init__(self, *, run_dir: Path, first_step: int, config: Mapping[str, Any]) -> None:
        optional_import("tensorboard", "tensorboard")
        self.run_dir, self.first_step = run_dir, first_step

    @cached_property
    def _writer(self) -> Any:
        module = optional_import("torch.utils.tensorboard", "tensorboard")
        purge = self.first_step + 1 if self.first_step else None
        return module.SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=purge)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        if "_writer" in vars(self):
            self._writer.close()


class WandbLogger:
    """A Weights & Biases run, which sends metrics, config and machine data to its server.

    Its own files go to RUN/wandb; a run that goes on does so in the W&B run of its directory.

    Args:
        project, entity, name: as in `wandb.init`; None: W&B's own choice, the run directory's name.
        mode: "online", "offline" (written to the disk only) or "disabled"; None: online, unless
            W&B's own settings say otherwise.

    Raises:
        ImportError: without the package wandb.
    """

    def __init__(
        self,
        *,
        run_dir: Path,
        first_step: int,
        config: Mapping[str, Any],
        project: str | None = None,
        entity: str | None = None,
        name: str | None = None,
        mode: str | None = None,
    ) -> None:
        self._wandb = optional_import("wandb", "wandb")
        self.run_dir, self.first_step = run_dir, first_step
        named = {"project": project, "entity": entity, "name": name or run_dir.name}
        self._arguments = {**named, "mode": mode, "config": dict(config)}

    @cached_property
    def _run(self) -> Any:
        id_file = self.run_dir / "wandb_run_id"
        if not self.first_step or not id_file.is_file():
            id_file.write_text(secrets.token_hex(4))
        settings = self._wandb.Settings(console="off", disable_git=True, disable_code=True)
        return self._wandb.init(
            dir=str(self.run_dir),
            id=id_file.read_text(),
            resume="allow",
            settings=settings,
            **self._arguments,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        if "_run" in vars(self):
            self._run.finish()


_SECONDS_BETWEEN_LINES = 10.0


def step_row(
    step: int, result: StepResult, *, lr: float, seconds: float, memory: float
) -> dict[str, Any]:
    """What is logged of a step; memory in MiB."""
    return {
        "step": step,
        "loss": result.loss,
        "lr": lr,
        "grad_norm": result.grad_norm,
        "target_tokens": result.target_tokens,
        "tokens_per_s": round(result.tokens / seconds, 1),
        "step_s": round(seconds, 4),
        "peak_memory_mib": round(memory, 1),
        **result.figures,
    }


def pair_figures(row: Mapping[str, Any], prefix: str = "") -> str:
    """What a row says of preferences; nothing for other runs."""
    key = f"{prefix}rewards/"
    if f"{key}margins" not in row:
        return ""
    return f"  margin {row[f'{key}margins']:.3f}  accuracy {row[f'{key}accuracies']:.2f}"


class MetricsLog:
    """One JSON object per line, readable as soon as it is written.

    Args:
        directory: of the run.
        step: the step that the run goes on from; rows up to it are kept, so that each step is there
            once.
        source: directory of the run that made these rows; None: the same one.
        loggers: told everything that is written, after the file.
        writes: off on ranks that only read what was evaluated.
    """

    def __init__(
        self,
        directory: Path,
        *,
        step: int = 0,
        source: Path | None = None,
        loggers: Sequence[Logger] = (),
        writes: bool = True,
    ) -> None:
        self._loggers = loggers
        self.path = directory / METRICS_FILE
        self.writes = writes
        earlier = (source or directory) / METRICS_FILE
        rows = read_rows(earlier) if step and earlier.is_file() else []
        kept = [row for row in itertools.takewhile(_is_of_a_step, rows) if row["step"] <= step]
        self._evaluated = {row["step"] for row in kept if "eval_loss" in row}
        if writes:
            write_whole(self.path, "".join(json.dumps(row) + "\n" for row in kept).encode())

    def write(self, *, step: int, **values: Any) -> None:
        """Raises a QLoRAError if the file cannot be written."""
        if self.writes:
            append_rows(self.path, [{"step": step, **values}])
            for logger in self._loggers:
                logger.log(step, values)

    def has_eval(self, step: int) -> bool:
        """Whether `step` was evaluated before the run was resumed."""
        return step in self._evaluated

    def sync(self) -> None:
        """What was written stays, whatever happens to the machine."""
        with self.path.open() as file:
            os.fsync(file.fileno())

    def close(self) -> None:
        """Close all loggers, whatever one of them raises."""
        with ExitStack() as stack:
            for logger in self._loggers:
                stack.callback(logger.close)


def _is_of_a_step(row: Any) -> bool:
    """Any other is none that a run has written, so what follows it may not be either."""
    return isinstance(row, dict) and type(row.get("step")) is int


def read_rows(file: Path) -> list[Any]:
    """The rows up to the first one that a kill or a power cut left in pieces."""
    rows = []
    for line in file.read_text(errors="replace").split("\n"):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            break
    return rows


class ProgressReport:
    """A live bar on a terminal; elsewhere a line now and then, and one at the end.

    Use as a context manager around the loop. `steps_done` were done by an earlier process; where
    `quiet`, nothing is shown.
    """

    def __init__(
        self,
        total_steps: int,
        console: PlainConsole | None = None,
        *,
        steps_done: int = 0,
        quiet: bool = False,
    ) -> None:
        self.console = console or PlainConsole(soft_wrap=True, quiet=quiet)
        self.total_steps = total_steps
        self._steps_done = steps_done
        self._last_line = 0.0
        self._first: tuple[int, float] | None = None  # step shown, and when
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}"),
            TextColumn("eta"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self._task = self._bar.add_task("", total=total_steps, completed=steps_done, figures="")

    def __enter__(self) -> ProgressReport:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._bar.disable:  # else it would print a line
            self._bar.stop()

    def step(self, row: Mapping[str, Any]) -> None:
        """Show a row of `step_row`."""
        step = row["step"]
        figures = (
            f"loss {row['loss']:.4f}{pair_figures(row)}  lr {row['lr']:.2e}  "
            f"{row['tokens_per_s']:,.0f} tok/s  {row['peak_memory_mib']:,.0f} MiB"
        )
        if not self._bar.disable:
            self._bar.update(self._task, completed=step, figures=figures)
            return
        now = time.monotonic()
        first = self._steps_done + 1
        if step in (first, self.total_steps) or now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            first_step, since = self._first or (step - 1, now - row["step_s"])
            eta = (now - since) / (step - first_step) * (self.total_steps - step)
            self._first = self._first or (step, now)
            self.say(f"step {step}/{self.total_steps}  {figures}  eta {eta:.0f} s")

    def say(self, text: object) -> None:
        """A line above the bar, and one only, whatever it quotes."""
        self.console.print(visible(str(text), keep="\t"))
