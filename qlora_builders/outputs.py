"""Files and folders that a user names for results: judged before anything slow, written whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qlora_builders.errors import ConfigError, QLoRAError


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


def write_whole(path: Path, content: bytes) -> None:
    """Write a file in one step: a half-written one never has the name, and none is left.

    Raises:
        QLoRAError: if it cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
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
    except OSError as error:
        raise _cannot_write(path, error) from error


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add lines of JSON to a file.

    Raises:
        QLoRAError: if it cannot be written.
    """
    try:
        with path.open("a") as file:
            file.writelines(json.dumps(row, default=str) + "\n" for row in rows)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> QLoRAError:
    return QLoRAError(f"{path}: cannot be written: {error.strerror or error}")
