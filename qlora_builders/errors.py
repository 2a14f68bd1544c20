"""The errors a user can cause, and the one way to spell "did you mean", plurals and home folders.

Everything here is a `ValueError`, so library callers may catch that alone; the command line turns
each into one readable message and exit code 2. Optional dependencies are the one exception: a
missing package is an `ImportError`, raised where it is first needed.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType


class QLoRAError(ValueError):
    """Base of every error that a config, a file or an argument can cause.

    Attributes:
        problems: a message for each; what files say is quoted there, so a line break in one is a
            character like any other.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class ConfigError(QLoRAError):
    """A config key, its value or a combination of them; the message carries the full key."""


class PlanError(QLoRAError):
    """A component rule; the message carries the rule, what it could have matched, what to write."""


class CheckpointError(QLoRAError):
    """A checkpoint or adapter; the message carries the file and the tensor."""


class DataError(QLoRAError):
    """A data file, tokenizer or chat template; the message carries the file and the row."""


class UnsafeError(DataError):
    """What a stranger wrote takes more time or memory than it may; no fault of the row."""


class UnsafeTemplateError(UnsafeError):
    """A template that does so, or that tried to leave its sandbox."""


class TrainingError(QLoRAError):
    """A run that cannot go on, such as one whose loss is not finite."""


def expand_home(path: str | Path, kind: type[QLoRAError]) -> Path:
    """`~/x` and `~name/x` as the folder of that user.

    Raises:
        QLoRAError: of this kind, if that user has none here.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        start = Path(path).parts[0]
        raise kind(
            f"{path}: there is no home folder for {start!r} here; write the whole path, from '/'"
        ) from error


def nearest(name: str, options: Iterable[str]) -> str | None:
    """The option spelled most like `name`, or None when nothing comes close."""
    matches = difflib.get_close_matches(name, list(options), n=1, cutoff=0.6)
    return matches[0] if matches else None


def counted(number: int, noun: str) -> str:
    """`"1 row"`, `"1,200 rows"`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def listed(names: Sequence[str]) -> str:
    """The first names of a long list, for an error message."""
    shown = ", ".join(names[:8]) or "none"
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """`"; did you mean 'rank'?"`, or the sorted options when no spelling is near."""
    options = sorted(options)
    match = nearest(name, options)
    if match is not None:
        return f"; did you mean {match!r}?"
    return f"; allowed: {', '.join(options)}" if options else ""


def optional_import(module: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Raises:
        ImportError: if it is not installed; the message names the extra that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"this needs the package {package!r}: pip install 'qlora-builders[{extra}]'"
        ) from error
