"""What a run writes into its folder: a log, step checkpoints, and the result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from qlora_builders.checkpoint import save_adapter, save_checkpoint
from qlora_builders.config.compose import save_config
from qlora_builders.console import StopRequest, stop_on_signal
from qlora_builders.distributed import whole_parameters
from qlora_builders.errors import CheckpointError, QLoRAError
from qlora_builders.files.outputs import CONFIG_FILE, ENVIRONMENT_FILE, append_rows, how_to_go_on
from qlora_builders.modules import CausalLM
from qlora_builders.report import read_run, write_report
from qlora_builders.runs.folder import remove_old_steps, run_directory, step_folder
from qlora_builders.runs.setup import Data, Run, about_run
from qlora_builders.runs.state import StepState, capture_step, has_adapters, write_step
from qlora_builders.training.device import describe_environment, resolve_dtype
from qlora_builders.training.loggers import MetricsLog, ProgressReport
from qlora_builders.training.optimizers import check_adapters_learned


@dataclass(frozen=True)
class Log:
    """Where a run reports, and how it hears that it is to stop."""

    metrics: MetricsLog
    progress: ProgressReport
    stop: StopRequest


@contextmanager
def open_log(run: Run, data: Data, lines: Sequence[str]) -> Iterator[Log]:
    """Take the run's folder, which only the main rank writes to, say `lines`, listen to signals."""
    cfg, ranks, folder, start = run.cfg, run.ranks, run.folder, run.start
    environment = describe_environment(run.device, run.compute_dtype)
    reports = [batches.dataset.report for batches in (data.train, data.eval) if batches]
    skipped = [f"{r.source}: {r.skipped_summary()}" for r in reports if r.skipped_rows]
    environment |= {"total_steps": data.total_steps, "skipped_rows": skipped}
    overwrite = start.step == 0 and (cfg.overwrite or ranks.restarts > 0)
    with ExitStack() as opened:
        if ranks.is_main:
            keep_last = cfg.training.keep_last
            opened.enter_context(
                run_directory(folder, start, overwrite=overwrite, keep_last=keep_last)
            )
            save_config(cfg, folder / CONFIG_FILE)
            append_rows(folder / ENVIRONMENT_FILE, [{"first_step": start.step, **environment}])
        metrics = MetricsLog(
            folder,
            step=start.step,
            source=start.run_dir,
            loggers=run.loggers,
            writes=ranks.is_main,
        )
        opened.callback(metrics.close)
        stop = opened.enter_context(stop_on_signal(ranks.gather))
        progress = opened.enter_context(
            ProgressReport(data.total_steps, steps_done=start.step, quiet=not ranks.is_main)
        )
        for line in lines:
            progress.say(line)
        yield Log(metrics, progress, stop)


class Checkpoints:
    """Saves what trains, the optimizer and the generators after a step.

    With `training.async_save` a copy is made and a thread writes it; the next save waits until it
    has done, so there is one copy at a time. All ranks have to do the same.
    """

    def __init__(
        self, run: Run, data: Data, model: CausalLM, optimizer: torch.optim.Optimizer, log: Log
    ) -> None:
        self._run, self._log, self._model, self._optimizer = run, log, model, optimizer
        self._about = about_run(data, model)
        self._apart = run.cfg.training.async_save
        self._ranks = run.ranks.apart() if self._apart else run.ranks
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._pending: Future[None] | None = None

    def save(self, step: int) -> None:
        """Raises a CheckpointError if it, or the one before it, cannot be written."""
        self.finish()
        run, model = self._run, self._model
        run.ranks.on_main(self._log.metrics.sync)
        adapters = has_adapters(model)
        with whole_parameters(model, run.ranks, only_trained=True) if adapters else nullcontext():
            state = capture_step(
                model,
                self._optimizer,
                step=step,
                about=self._about,
                base_model=run.cfg.checkpoint.dir,
                is_main=run.ranks.is_main,
                copied=self._apart,
            )
        if self._apart:
            self._pending = self._thread.submit(self._write, state)
        else:
            self._write(state)

    def finish(self) -> None:
        """Wait for what is being written; raises a CheckpointError if it cannot be."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self._thread.shutdown()
        if error is None:
            self.finish()

    def _write(self, state: StepState) -> None:
        folder = self._run.folder
        try:
            write_step(step_folder(folder, state.step), state, self._ranks)
        except CheckpointError as error:
            raise CheckpointError(f"{error}. {how_to_go_on(folder)}") from error
        keep_last = self._run.cfg.training.keep_last
        self._ranks.on_main(lambda: remove_old_steps(folder, keep_last))


def save_result(run: Run, model: CausalLM, log: Log) -> None:
    """adapter/ (PEFT layout) or model/ (Hugging Face layout).

    Raises:
        TrainingError: if the adapters have learned nothing.
    """
    check_adapters_learned(model, gather=run.ranks.gather)
    cfg, adapters = run.cfg, has_adapters(model)
    base, result = cfg.checkpoint.dir, run.folder / ("adapter" if adapters else "model")

    def save() -> None:
        if adapters:
            save_adapter(model, result, base_model=base)
        else:
            dtype = resolve_dtype(cfg.training.dtype)
            save_checkpoint(model, result, dtype=dtype, companions=base)

    with whole_parameters(model, run.ranks, only_trained=adapters):
        run.ranks.on_main(save)
    log.progress.say(f"wrote {result}")


def show_result(run: Run, log: Log) -> None:
    """report.html; where it cannot be written, a line that says so: the result is there."""
    if not run.ranks.is_main:
        return
    try:
        written = write_report([read_run(run.folder)], run.folder / "report.html")
        log.progress.say(f"wrote {written}")
    except QLoRAError as error:
        log.progress.say(f"no report: {error}")
