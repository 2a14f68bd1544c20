"""Where a run reports, and how it hears that it is to stop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

from qlora_builders.config.compose import save_config
from qlora_builders.console import StopRequest, stop_on_signal
from qlora_builders.runs.folder import run_directory
from qlora_builders.runs.setup import Data, Run
from qlora_builders.training.device import add_environment, describe_environment
from qlora_builders.training.loggers import MetricsLog, ProgressReport


@dataclass(frozen=True)
class Log:
    metrics: MetricsLog
    progress: ProgressReport
    stop: StopRequest


@contextmanager
def open_log(run: Run, data: Data, lines: Sequence[str]) -> Iterator[Log]:
    """Take the run's folder, say `lines`, listen to signals."""
    ranks, start = run.ranks, run.start
    environment = describe_environment(run.device, run.compute_dtype)
    environment |= {"total_steps": data.total_steps, "skipped_rows": _skipped_rows(data)}
    quiet = not ranks.is_main
    with (
        _open_folder(run, environment) as metrics,
        stop_on_signal(ranks.gather) as stop,
        ProgressReport(data.total_steps, steps_done=start.step, quiet=quiet) as progress,
    ):
        for line in lines:
            progress.say(line)
        yield Log(metrics, progress, stop)


@contextmanager
def _open_folder(run: Run, environment: dict[str, Any]) -> Iterator[MetricsLog]:
    """The run directory and what goes there all the time, from the main rank alone."""
    cfg, ranks, folder, start, loggers = run.cfg, run.ranks, run.folder, run.start, run.loggers
    if not ranks.is_main:
        yield MetricsLog(folder, step=start.step, source=start.run_dir, writes=False)
        return
    overwrite = start.step == 0 and (cfg.overwrite or ranks.restarts > 0)
    keep_last = cfg.training.keep_last
    with run_directory(folder, start, overwrite=overwrite, keep_last=keep_last), closing(loggers):
        save_config(cfg, folder / "config.yaml")
        add_environment(folder, environment, first_step=start.step)
        yield MetricsLog(folder, step=start.step, source=start.run_dir, loggers=loggers)


def _skipped_rows(data: Data) -> list[str]:
    reports = [batches.dataset.report for batches in (data.train, data.eval) if batches]
    return [f"{r.source}: {r.skipped_summary()}" for r in reports if r.skipped_rows]
