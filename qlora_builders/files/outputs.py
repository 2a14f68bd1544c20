"""Files and folders that a user names for results: judged before anything slow, written whole.

One rule for all: what was computed is never written over. Only a page of `report`, which is drawn
anew from a run's records, replaces the one before.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_builders.errors import ConfigError, QLoRAError
from qlora_builders.visible import say

# of a run's folder
CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
ENVIRONMENT_FILE = "environment.jsonl"
RESULTS = ("adapter", "model")  # folders that a finished run has one of


def fault_of_path(path: str) -> str | None:
    """What the system, or a config file, has against a name that a user gave, whether there is
    such a file or not; as the end of a message."""
    try:
        path.encode()
        os.stat(path)
    except UnicodeEncodeError:
        return "is not UTF-8 text, so no config can name it; rename it"
    except ValueError:
        return "holds a NUL character, which no name of a file may"
    except (FileNotFoundError, NotADirectoryError):
        return None  # whoever wants a file there says more about it
    except OSError as error:
        return f"cannot be used: {error.strerror}; choose another place"
    return None


def check_writable(path: Path, key: str, *, folder: bool = False) -> None:
    """Whether a file (or a folder) of that name could be written, as far as can be seen.

    Args:
        key: the config key that named it, for the message.

    Raises:
        ConfigError: if something else has the name, or the folder around it takes no files.
    """
    try:
        if path.exists() and not (path.is_dir() if folder else path.is_file()):
            kind = "a file" if path.is_file() else "a folder" if path.is_dir() else "no plain file"
            wanted = "a new or empty folder" if folder else "a file"
            raise ConfigError(f"{key}={path} is {kind}; give the name of {wanted}")
        around = [path, *path.absolute().parents] if folder else path.absolute().parents
        place = next(parent for parent in around if parent.exists())
    except OSError as error:
        raise ConfigError(
            f"{key}={path} cannot be used: {error.strerror}; choose another place"
        ) from error
    if not place.is_dir():
        raise ConfigError(f"{key}={path}: {place} is a file, not a folder; choose another place")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"{key}={path}: {place} is not writable; choose another place")


def check_new(path: Path, key: str, *, grows: bool = False, folder: bool = False) -> None:
    """`check_writable` for a file, or a folder, of results.

    Args:
        grows: it will be written by `growing`.

    Raises:
        ConfigError: also if it exists, or what was finished of one that grows.
    """
    check_writable(path, key, folder=folder)
    if path.exists():
        wanted = "a new folder" if folder else "another name"
        raise ConfigError(f"{key}={path} exists; choose {wanted}")
    if grows and _partial(path).exists():
        raise ConfigError(
            f"{key}={path}: {_partial(path)} holds what an interrupted run had finished; rename or "
            "remove it, or choose another name"
        )


@contextmanager
def growing(path: Path) -> Iterator[Callable[[bytes], None]]:
    """Write a new file part by part, with the function that this gives.

    It gets its name when all is written. If it comes to that never, by an error or Ctrl-C, the
    parts that are finished stay under the name with `.partial` behind, and stderr says so.

    Raises:
        QLoRAError: if it cannot be written.
    """
    partial = _partial(path)
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = partial.open("xb", buffering=0)
    size = 0

    def write(part: bytes) -> None:
        nonlocal size
        rest = memoryview(part)
        with _naming(path):
            while rest:
                rest = rest[file.write(rest) :]
        size += len(part)

    try:
        with file:
            yield write
            with _naming(path):
                os.fsync(file.fileno())
        with _naming(path):
            partial.replace(path)
    except BaseException:
        if size:
            os.truncate(partial, size)
            say(f"what was finished is in {partial}", file=sys.stderr)
        else:
            partial.unlink()
        raise


def write_whole(path: Path, content: bytes) -> None:
    """Write a file in one step: a half-written one never has the name, and none is left.

    Raises:
        QLoRAError: if it cannot be written.
    """
    partial = _partial(path)
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)  # a link could lead elsewhere
        try:
            with partial.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add lines of JSON to a file.

    Raises:
        QLoRAError: if it cannot be written.
    """
    with _naming(path), path.open("a") as file:
        file.writelines(json.dumps(row, default=str) + "\n" for row in rows)


def step_folders(run_dir: Path) -> list[Path]:
    """The step checkpoints of a run, oldest first; good or not."""
    folders = (run_dir / "checkpoints").glob("step_*")
    return sorted((f for f in folders if f.name[5:].isdecimal()), key=step_of)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def last_checkpoint(run_dir: Path) -> str:
    """For a message."""
    folders = step_folders(run_dir)
    return f"the last checkpoint is {folders[-1]}" if folders else "no checkpoint was written"


def how_to_go_on(run_dir: Path) -> str:
    """For the last message of a run that ends early."""
    if step_folders(run_dir):
        return f"{last_checkpoint(run_dir)}; training.resume=auto goes on from it"
    return (
        f"{last_checkpoint(run_dir)}, so there is nothing to go on from; start again with "
        "overwrite=true or in another output_dir"
    )


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """The system's errors with the name of the file."""
    try:
        yield
    except OSError as error:
        raise QLoRAError(f"{path}: cannot be written: {error.strerror or error}") from error
