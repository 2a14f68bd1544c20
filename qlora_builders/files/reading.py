"""Reading files that somebody else may have put there: what waits or never ends is no file, and
what the standard JSON parser lets pass is an error here."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from qlora_builders.errors import CheckpointError

_DEEPEST = 200  # objects and lists in each other: whoever walks them must not exhaust the stack
_TOO_DEEP = "not JSON that can be read: nested too deeply"


def open_plain(file: Path) -> BinaryIO:
    """For reading, if it is a plain file or a link to one.

    Raises:
        ValueError: that says what is wrong, for the caller to add the file.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # pipes would wait
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
        raise ValueError(f"is {kind}; a plain file is needed")
    return os.fdopen(descriptor, "rb")


def read_plain(file: Path) -> bytes:
    """
    Raises:
        ValueError: as `open_plain`.
    """
    with open_plain(file) as handle:
        try:
            return handle.read()
        except OSError as error:
            raise ValueError(f"cannot be read: {error.strerror}") from error


def read_json(file: Path) -> Any:
    """`parse_json` of a file.

    Raises:
        ValueError: that says what is wrong, for the caller to add the file.
    """
    return parse_json(read_plain(file))


def read_json_object(file: Path, *, expected: str) -> dict[str, Any]:
    """
    Args:
        expected: what the folder should have been, for the message about a missing file.

    Raises:
        CheckpointError: if the file is missing or does not hold one JSON object.
    """
    if not file.exists():
        raise CheckpointError(f"{file}: missing; expected {expected}")
    try:
        content = read_json(file)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds {type(content).__name__}, expected an object")
    return content


def parse_json(text: bytes) -> Any:
    """UTF-8 JSON without duplicate keys, NaN, infinity, or nesting that exhausts the stack.

    Raises:
        ValueError: that says what is wrong, for the caller to add the file.
    """
    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"not JSON: {error.msg}, {line}column {error.colno}") from error
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error
    _check_depth(value)
    return value


def _check_depth(value: Any) -> None:
    level = [value] if type(value) in (dict, list) else []
    for _ in range(_DEEPEST):
        if not level:
            return
        inside = (node.values() if type(node) is dict else node for node in level)
        level = [v for values in inside for v in values if type(v) in (dict, list)]
    if level:
        raise ValueError(_TOO_DEEP)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice[:80]!r} appears twice")
    return found


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:80]} is too large a number")
    return value
