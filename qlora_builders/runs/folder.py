"""A run's folder: who may use it, where a run starts, and all that it writes there.

RUN/config.yaml  metrics.jsonl  report.html  checkpoints/step_N/  adapter/ or model/
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from qlora_builders.checkpoint import save_adapter, save_checkpoint
from qlora_builders.checkpoint.base_record import base_record
from qlora_builders.config.compose import save_config
from qlora_builders.config.schema import FinetuneConfig
from qlora_builders.console import StopRequest, stop_on_signal
from qlora_builders.data import Batches
from qlora_builders.distributed import Ranks, whole_parameters
from qlora_builders.errors import CheckpointError, ConfigError, QLoRAError
from qlora_builders.files.folders import check_manifest, clean_up, remove_directory
from qlora_builders.files.outputs import (
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    RESULTS,
    append_rows,
    check_writable,
    how_to_go_on,
    step_folders,
    step_of,
)
from qlora_builders.files.reading import read_json_object
from qlora_builders.modules import CausalLM
from qlora_builders.report import read_run, write_report
from qlora_builders.runs.state import (
    INFO_FILE,
    STATE_FILE,
    StepState,
    capture_step,
    has_adapters,
    read_state,
    write_step,
)
from qlora_builders.training.device import describe_environment, is_compiled, resolve_dtype
from qlora_builders.training.loggers import Logger, MetricsLog, ProgressReport
from qlora_builders.training.optimizers import check_adapters_learned

AUTO = "auto"

CheckAbout = Callable[[dict[str, Any]], None]


def step_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step}"


@dataclass(frozen=True)
class Start:
    """Where a run starts: at step 0, or after the step of a checkpoint."""

    step: int = 0
    folder: Path | None = None  # of the checkpoint
    about: dict[str, Any] = field(default_factory=dict)  # as it was given to `capture_step`
    messages: tuple[str, ...] = ()  # how that came about
    seen: tuple[Any, ...] | None = field(default=None, compare=False)  # `_marks` at that time

    @property
    def run_dir(self) -> Path | None:
        """Of the run that made the checkpoint."""
        return None if self.folder is None else self.folder.parent.parent


@dataclass(frozen=True)
class Run:
    """A run before anything is loaded."""

    cfg: FinetuneConfig
    ranks: Ranks
    folder: Path
    start: Start
    loggers: Sequence[Logger]
    device: torch.device
    compute_dtype: torch.dtype


@dataclass(frozen=True)
class Data:
    """This rank's part of the batches, and how many steps they make.

    Attributes:
        about: what the loss curve depends on and is known before the base is loaded, as JSON.
    """

    train: Batches
    eval: Batches | None
    total_steps: int
    about: dict[str, Any]


def find_start(
    run_dir: Path,
    *,
    resume: str | None,
    overwrite: bool,
    check_about: CheckAbout = lambda about: None,
) -> Start:
    """Check that a run may use `run_dir`, and where it starts, before anything slow happens.

    Args:
        resume: None; "auto": the newest good checkpoint in `run_dir`, or step 0 if there is none;
            or the path of a checkpoint.
        overwrite: replace the run in `run_dir`.
        check_about: raises a ValueError if what a checkpoint says is not what its recipe writes.

    Raises:
        ConfigError: if `run_dir` cannot be written; if it is not empty and neither argument allows
            that; if it holds no run, not the one that `resume` names, or a finished one without a
            checkpoint.
        CheckpointError: if `resume` is a path without a good checkpoint.
    """
    check_writable(run_dir, "output_dir", folder=True)
    check_writable(run_dir / "checkpoints", "output_dir", folder=True)
    seen, folders = _marks(run_dir), step_folders(run_dir)
    is_run = (run_dir / CONFIG_FILE).is_file()
    if _is_taken(run_dir) and resume is None and not overwrite:
        ways = "choose another, or set overwrite=true" if is_run else "choose another"
        if is_run and folders:
            ways = (
                "choose another, go on with its run by training.resume=auto, or set overwrite=true"
            )
        raise ConfigError(f"output_dir={run_dir} is not empty; {ways}")
    if _is_taken(run_dir) and not is_run:
        key = "overwrite=true replaces" if overwrite else "training.resume goes on with"
        raise ConfigError(f"output_dir={run_dir} holds no run; {key} only runs")
    if resume is None:
        return Start(seen=seen)
    if resume == AUTO:
        return replace(_newest_start(run_dir, overwrite, check_about), seen=seen)
    folder = Path(resume)
    start = _start_at(folder, check_about)
    # only what comes last in a directory may go on there; anything else would replace a run
    last = os.path.realpath(folders[-1]) if folders else None
    if _is_taken(run_dir) and last != os.path.realpath(folder):
        on = ", or go on with that run by training.resume=auto" if folders else ""
        raise ConfigError(
            f"output_dir={run_dir} holds a run whose last checkpoint is not training.resume="
            f"{folder}; choose a new output_dir{on}"
        )
    return replace(start, seen=seen)


def _newest_start(run_dir: Path, overwrite: bool, check_about: CheckAbout) -> Start:
    messages: list[str] = []
    for folder in reversed(step_folders(run_dir)):
        try:
            return _start_at(folder, check_about, messages)
        except CheckpointError as error:
            messages.append(f"warning: a damaged checkpoint is skipped: {error}")
    for name in RESULTS:
        if not overwrite and (run_dir / name).is_dir():
            raise ConfigError(
                f"output_dir={run_dir} holds the {name}/ of a finished run, and no checkpoint "
                "to go on from; choose another, or set overwrite=true instead of training.resume"
            )
    return Start(messages=(*messages, f"no checkpoint in {run_dir} to resume from: a new run"))


def _start_at(folder: Path, check_about: CheckAbout, messages: Iterable[str] = ()) -> Start:
    step, about = read_step(folder)
    try:
        check_about(about)
    except ValueError as error:
        raise CheckpointError(f"{folder / INFO_FILE}: {error}") from error
    return Start(step, folder, about, (*messages, f"resumed after step {step} from {folder}"))


def read_step(folder: Path) -> tuple[int, dict[str, Any]]:
    """The step of a checkpoint whose files are those that were written, and what it says.

    Raises CheckpointError if it is no step checkpoint, or a damaged one.
    """
    if folder.is_symlink():
        raise CheckpointError(f"{folder}: is a symbolic link; name the folder it leads to")
    if folder.is_file():
        raise CheckpointError(f"{folder}: is a file; give a folder named .../checkpoints/step_N")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such directory; give one named .../checkpoints/step_N")
    file = folder / INFO_FILE
    try:
        check_manifest(folder)
        about = read_json_object(file, expected="a step checkpoint")
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror}") from error
    step, named = about.get("step"), re.fullmatch(r"step_([0-9]+)", folder.name)
    if type(step) is not int or step < 1:
        raise CheckpointError(f"{file}: step is {step!r:.80}; expected a whole number >= 1")
    if named and int(named[1]) != step:
        raise CheckpointError(f"{file}: step is {step}, but the folder is {folder.name}")
    read_state(folder / STATE_FILE, mapped=True)
    return step, about


def _is_taken(run_dir: Path) -> bool:
    """Whether there is more than the first file of a run that was killed at once."""
    return run_dir.exists() and any(path.suffix != ".partial" for path in run_dir.iterdir())


def _marks(run_dir: Path) -> tuple[Any, ...]:
    """Other than before, if a process has taken the directory or finished there in between: each
    writes config.yaml when it comes, its result when it goes, and step checkpoints in between."""
    files = [run_dir / name for name in (CONFIG_FILE, *RESULTS) if (run_dir / name).exists()]
    times = [(file.name, file.stat().st_ino, file.stat().st_mtime_ns) for file in files]
    return (_is_taken(run_dir), *times, *(folder.name for folder in step_folders(run_dir)))


@contextmanager
def run_directory(
    run_dir: Path, start: Start, *, overwrite: bool, keep_last: int
) -> Iterator[None]:
    """Make `run_dir` or take it over, keep other processes out of it, and tidy it up.

    Tidied up means: nothing that a dead process left half-written or had not yet removed, and no
    checkpoint newer than the one that the run goes on from. Those are damaged; they get the name
    step_N.damaged.

    Raises ConfigError if another process is using it, or has used it since `start` was found.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = os.open(run_dir, os.O_RDONLY)  # ends with the process, however that ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EWOULDBLOCK:
            os.close(lock)
            raise ConfigError(f"output_dir={run_dir} is in use by another process") from error
        # some network file systems have no locks; then nothing keeps two runs apart
    try:
        if start.seen not in (None, _marks(run_dir)):
            raise ConfigError(
                f"output_dir={run_dir} was used by another process while this one was loading; "
                "nothing was changed: choose another, or start this command again"
            )
        if overwrite:
            for path in run_dir.iterdir():
                shutil.rmtree(path) if _is_real_directory(path) else path.unlink()
        clean_up(run_dir)
        clean_up(run_dir / "checkpoints")
        for folder in step_folders(run_dir):
            if step_of(folder) > start.step:
                damaged = folder.with_name(folder.name + ".damaged")
                shutil.rmtree(damaged, ignore_errors=True)
                folder.rename(damaged)
        remove_old_steps(run_dir, keep_last)
        yield
    except BaseException:
        with suppress(OSError):  # it holds something
            run_dir.rmdir()
        raise
    finally:
        os.close(lock)


def remove_old_steps(run_dir: Path, keep_last: int) -> None:
    for folder in step_folders(run_dir)[:-keep_last]:
        if _is_real_directory(folder):  # what else has the name is none of ours
            remove_directory(folder)


def _is_real_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


# ---- what a run writes there ---------------------------------------------------------------------


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


def about_run(data: Data, model: CausalLM) -> dict[str, Any]:
    """All that the loss curve depends on, as JSON."""
    return data.about | {"base": base_of(model), "compile": "on" if is_compiled(model) else "off"}


def base_of(model: CausalLM) -> dict[str, Any]:
    record = base_record(model)
    return {"content": record["checkpoint"]["content_hash"], "config": record["config"]}


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

    Raises TrainingError if the adapters have learned nothing.
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
