"""The header of a safetensors file: checked in full before a byte of any tensor is read.

    8 bytes   N, little-endian
    N bytes   JSON: {name: {"dtype": "BF16", "shape": [..], "data_offsets": [begin, end]}, ...,
              "__metadata__": {string: string}}, padded with spaces
    the rest  the tensors, which must cover it without gaps or overlaps

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_builders.errors import CheckpointError
from qlora_builders.files.reading import open_plain, parse_json

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: `start` counts from the beginning of the file."""

    dtype: torch.dtype
    shape: torch.Size
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize  # Size.numel() overflows silently


def read_header(file: Path) -> dict[str, Entry]:
    """Tensor name -> entry, in the order of the header.

    Raises:
        CheckpointError: if the file cannot be read or is not such a file.
    """
    try:
        with open_plain(file) as handle:
            size = os.fstat(handle.fileno()).st_size
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(f"{size} bytes cannot hold a header of {length} bytes")
            content = parse_json(handle.read(length))
        return _entries(content, data_start=8 + length, size=size)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read as safetensors: {error}") from error


def _entries(content: Any, *, data_start: int, size: int) -> dict[str, Entry]:
    if not isinstance(content, dict):
        raise ValueError(f"the header is {type(content).__name__}, expected an object")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("__metadata__ must hold strings")
    entries = {name: _entry(name, item, data_start) for name, item in content.items()}
    position = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != position:
            raise ValueError(f"{name} begins at byte {entry.start}, expected {position}")
        position += entry.nbytes
    if position != size:
        raise ValueError(f"the tensors end at byte {position}, but the file at {size}")
    return entries


def _entry(name: str, item: Any, data_start: int) -> Entry:
    if not isinstance(item, dict) or set(item) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name}: expected the keys dtype, shape and data_offsets")
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name}: dtype {dtype!r} is unknown")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{name}: shape and data_offsets must be lists of integers >= 0")
    entry = Entry(DTYPES[dtype], torch.Size(shape), data_start + offsets[0])
    if offsets[0] + entry.nbytes != offsets[1]:
        raise ValueError(f"{name}: {offsets} is not {entry.nbytes} bytes, as {shape} {dtype} needs")
    return entry


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(x) is int and 0 <= x < 2**48 for x in value)


def write_header(
    tensors: Sequence[tuple[str, torch.dtype, torch.Size]], metadata: Mapping[str, str]
) -> bytes:
    """Length and JSON for tensors that follow in this order; the data begin 64-byte aligned, as a
    cache line, for those who map the file."""
    content: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, dtype, shape in tensors:
        end = position + shape.numel() * dtype.itemsize
        offsets = [position, end]
        content[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
        position = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text
