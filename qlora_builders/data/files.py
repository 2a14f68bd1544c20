"""Rows from a local file or from the hub, as a sequence of dicts."""

from __future__ import annotations

import mmap
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast, overload

import numpy as np

from qlora_builders.errors import DataError, expand_home, nearest, optional_import
from qlora_builders.files.reading import parse_json, read_plain

Row = dict[str, Any]

ROW_SUFFIXES = (".json", ".jsonl", ".parquet")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# owner/name, then perhaps the split, or configuration and split: "openai/gsm8k:main:train"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+){0,2}")


def load_rows(source: str | Path, *, split: str = "train") -> Sequence[Row]:
    """The rows of `source`.

    `source` is a `.jsonl` file (an object per line), a `.json` file (a list of objects, or an
    object whose `data` is one), a `.parquet` file, or a hub id: `owner/name`,
    `owner/name:split` or `owner/name:config:split`. `split` is what a hub id without one
    means; a local file is one split. JSON lines are parsed when they are read, not before; a row
    that is no object is refused by `to_documents`.

    Raises:
        DataError: if the file is missing or broken (file and line are named), or the hub says no.
        ImportError: if Parquet or the hub is asked for and `datasets` is not installed.
    """
    name = str(source)
    path = expand_home(name, DataError)
    if path.is_file():
        suffix = path.suffix.lower()
        if suffix == ".jsonl":
            return JsonLines(path)
        if suffix == ".json":
            return _read_json(path)
        if suffix == ".parquet":
            return _read_parquet(path)
        raise DataError(
            f"{path}: cannot read files that end in {suffix or 'nothing'!r}; "
            f"allowed: {', '.join(ROW_SUFFIXES)}"
        )
    looks_local = (
        name.startswith((".", "/", "~"))
        or path.suffix.lower() in ROW_SUFFIXES
        or (len(path.parts) > 1 and path.parent.is_dir())
    )
    if path.exists() or looks_local or not _HUB_ID.fullmatch(name):
        raise DataError(_missing_file(path))
    return _read_hub(name, split)


def describe_row(rows: Sequence[Row], source: str | Path, index: int) -> str:
    """Where row `index` (counted from 0) is, for an error message, which counts from 1."""
    if isinstance(rows, JsonLines):
        return f"{source}, line {rows.line_number(index)}"
    return f"{source}, row {index + 1} of {len(rows)}"


class JsonLines(Sequence[Row]):
    """A `.jsonl` file as a sequence: mapped into memory, each line parsed when it is asked for.

    Blank lines are skipped.

    Raises:
        DataError: naming file and line, for a line that is not JSON.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data: mmap.mmap | bytes = b""
        if path.stat().st_size:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        spans, numbers = array("q"), array("q")
        at = len(_BYTE_ORDER_MARK) if self._data[:3] == _BYTE_ORDER_MARK else 0
        number = 0
        while at < len(self._data):
            end = self._data.find(b"\n", at)
            end = len(self._data) if end < 0 else end
            number += 1
            if self._data[at:end].strip():
                spans.extend((at, end))
                numbers.append(number)
            at = end + 1
        self._spans = np.array(spans, dtype=np.int64).reshape(-1, 2)  # [rows, 2], in bytes
        self._numbers = np.array(numbers, dtype=np.int64)  # [rows], counted from 1

    def __len__(self) -> int:
        return len(self._spans)

    def line_number(self, index: int) -> int:
        """The line of row `index` in the file, counted from 1."""
        return int(self._numbers[index])

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self._parse(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._parse(index % len(self))

    def __iter__(self) -> Iterator[Row]:
        return map(self._parse, range(len(self)))  # goes on after a row that is an error

    def _parse(self, index: int) -> Row:
        start, end = (int(v) for v in self._spans[index])
        where = f"{self.path}, line {self.line_number(index)}"
        line, hint = self._data[start:end], ""
        if index == 0 and line.lstrip().startswith(b"["):
            hint = "; a file that is one list has to be named .json"
        try:
            row = parse_json(line)
        except ValueError as error:
            raise DataError(f"{where}: {error}{hint}") from error
        if hint:
            raise DataError(f"{where}: holds a list, and an object is needed{hint}")
        return cast(Row, row)


def _read_json(path: Path) -> Sequence[Row]:
    try:
        value = parse_json(read_plain(path).removeprefix(_BYTE_ORDER_MARK))
    except ValueError as error:
        hint = ""
        if "Extra data" in str(error):
            hint = "; a file with one object per line has to be named .jsonl"
        raise DataError(f"{path}: {error}{hint}") from error
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise DataError(
            f"{path}: holds a {type(value).__name__}; a list of objects is needed, "
            'or an object whose "data" is such a list'
        )
    return rows


def _read_parquet(path: Path) -> Sequence[Row]:
    datasets = optional_import("datasets", "data")
    logging, bars = datasets.logging, not datasets.are_progress_bars_disabled()
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # it logs the error that it raises
    if bars:
        datasets.disable_progress_bars()
    try:
        rows = datasets.Dataset.from_parquet(str(path))
        rows.data.validate(full=True)  # such as text that is not UTF-8, before a row is read
        return cast(Sequence[Row], rows)
    except Exception as error:  # pyarrow and datasets have a hierarchy each
        raise DataError(f"{path}: not a Parquet file this can read: {error}") from error
    finally:
        logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


def _read_hub(name: str, split: str) -> Sequence[Row]:
    datasets = optional_import("datasets", "data")
    hub_id, *rest = name.split(":")
    configuration = rest[0] if len(rest) == 2 else None
    split = rest[-1] if rest else split
    try:
        return cast(Sequence[Row], datasets.load_dataset(hub_id, configuration, split=split))
    except Exception as error:  # network, authorization, unknown split: each has its own class
        raise DataError(
            f"cannot load {hub_id!r} (configuration {configuration!r}, split {split!r}) from the "
            f"hub, and there is no such local file: {error}"
        ) from error


def _missing_file(path: Path) -> str:
    if path.is_dir():
        held = sorted(p.name for p in path.iterdir() if p.suffix.lower() in ROW_SUFFIXES)
        return f"{path} is a directory; name one file in it: {', '.join(held) or 'none fits'}"
    if path.exists():
        return f"{path} is a pipe or device; a plain file is needed"
    message = f"no such file: {path}"
    if path.parent.is_dir():
        names = [p.name for p in path.parent.iterdir()]
        match = nearest(path.name, names)
        if match is not None:
            return f"{message}; did you mean {str(path.parent / match)!r}?"
        message += f"; {path.parent.resolve()} holds no file with a name like it"
    else:
        message += f"; the directory {path.parent} does not exist either"
    return (
        f"{message} (a hub id is written owner/name, owner/name:split or owner/name:config:split)"
    )
