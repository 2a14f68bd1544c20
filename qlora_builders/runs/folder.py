"""A run's directory: whose it is, and which of its step checkpoints are good.

RUN/config.yaml  metrics.jsonl  report.html  checkpoints/step_N/  adapter/ or model/
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qlora_builders.errors import CheckpointError, ConfigError
from qlora_builders.files.folders import check_manifest, clean_up, remove_directory
from qlora_builders.files.outputs import (
    CONFIG_FILE,
    RESULTS,
    check_writable,
    step_folders,
    step_of,
)
from qlora_builders.files.reading import read_json_object
from qlora_builders.runs.state import INFO_FILE, STATE_FILE, read_state

AUTO = "auto"

CheckAbout = Callable[[dict[str, Any]], None]


def step_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step}"


@dataclass(frozen=True)
class Start:
    """Where a run starts: at step 0, or after the step of a checkpoint."""

    step: int = 0
    folder: Path | None = None  # of the checkpoint
    about: dict[str, Any] = field(default_factory=dict)  # as it was given to `add_step`
    messages: tuple[str, ...] = ()  # how that came about
    seen: tuple[Any, ...] | None = field(default=None, compare=False)  # `_marks` at that time

    @property
    def run_dir(self) -> Path | None:
        """Of the run that made the checkpoint."""
        return None if self.folder is None else self.folder.parent.parent


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
        ways = "choose another"
        ways += ", go on with its run by training.resume=auto" if is_run and folders else ""
        ways += ", or set overwrite=true" if is_run else ""
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

    Raises:
        CheckpointError: if it is no step checkpoint, or a damaged one.
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

    Raises:
        ConfigError: if another process is using it, or has used it since `start` was found.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = os.open(run_dir, os.O_RDONLY)  # ends with the process, however that ends
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK:
                raise ConfigError(f"output_dir={run_dir} is in use by another process") from error
            # some network file systems have no locks; then nothing keeps two runs apart
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
