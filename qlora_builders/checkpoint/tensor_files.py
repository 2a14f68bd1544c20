"""Safetensors directories: read one tensor at a time, write one tensor at a time.

Files are read by the `safetensors` library, which maps them; what it does not refuse in a header is
refused here. A mapping lives as long as its tensor. For `load` and `load_rows` that is a moment:
they copy, part by part, so that never more of a file is in memory than of the tensor.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qlora_builders.errors import CheckpointError, listed
from qlora_builders.files.reading import open_plain, parse_json, read_json_object
from qlora_builders.tensor.layouts import tensor_bytes

STEM = "model"  # model.safetensors, or model-00001-of-00002.safetensors with an index
MAX_SHARD_BYTES = 5 * 10**9
READERS = 2
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
_MOST_HEADER_BYTES = 100_000_000  # the limit of the library
_PART_BYTES = 2**24  # copied at once
_MADV_POPULATE_READ = 22  # Linux 5.14
# dtype -> integers of the same size, bits of infinity: NaN has larger ones, all else smaller
_BITS = {
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.int32, 0x7F80_0000),
}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file or to be written: what must be known beforehand, and how to get it.

    `quantized` names the type of weight that `load` gives, where it gives no plain one; `shape` and
    `dtype` are those of the weight it stands for. `load` gives it in memory of its own,
    `load_rows(start, stop)`, where the file allows it, a part; `map`, where there is one, as pages
    of the file: to be kept only if it is `mappable`, a file that nobody changes in place. `source`
    is the file, for error messages.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    load: Callable[[], Tensor]
    source: Path | None = None
    quantized: str = ""
    load_rows: Callable[[int, int], Tensor] | None = None
    map: Callable[[], Tensor] | None = None
    mappable: bool = False

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


# ---- in -----------------------------------------------------------------------------------------


def find_tensors(directory: Path, *, stem: str = STEM) -> dict[str, Path]:
    """Tensor name -> file, for a single-file or sharded checkpoint directory.

    Raises:
        CheckpointError: if a file is missing, or the index points outside the directory.
    """
    index = directory / f"{stem}.safetensors.index.json"
    if index.exists():
        weight_map = read_json_object(index, expected="a safetensors index").get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: not a safetensors index: it has no weight_map")
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise CheckpointError(
                    f"{index}: {name} points to {file!r}; shards must lie beside the index"
                )
        # isfile of os.path: too long a name is no error there
        missing = {f for f in weight_map.values() if not os.path.isfile(directory / f)}
        if missing:
            raise CheckpointError(
                f"{index}: shards missing: {listed(sorted(missing))}; download again"
            )
        return {name: directory / file for name, file in weight_map.items()}
    single = directory / f"{stem}.safetensors"
    if not single.is_file():
        raise CheckpointError(
            f"{directory}: neither {single.name} nor {index.name} there; expected a directory "
            f"with safetensors weights, got {listed(sorted(f.name for f in directory.iterdir()))}"
        )
    return dict.fromkeys(read_header(single), single)


def open_tensors(
    directory: Path, *, stem: str = STEM, mappable: bool = False
) -> dict[str, LazyTensor]:
    """Every tensor of such a directory; headers are read and checked, tensors are not.

    Args:
        mappable: nobody changes these files in place, so tensors may be kept mapped.

    Raises:
        CheckpointError: as those two, or for a shard without a tensor that the index has there.
    """
    files = find_tensors(directory, stem=stem)
    headers = {file: read_header(file) for file in dict.fromkeys(files.values())}
    openers: dict[Path, Callable[[], Any]] = {}
    for file in headers:
        opened = partial(safe_open, file, framework="pt")
        openers[file] = cache(opened) if mappable else opened  # one mapping for all that is kept
    found = {}
    for name, file in files.items():
        if name not in headers[file]:
            index = directory / f"{stem}.safetensors.index.json"
            raise CheckpointError(f"{file}: no tensor {name!r}, though {index} names it here")
        dtype, shape = headers[file][name]
        found[name] = LazyTensor(
            name,
            shape,
            dtype,
            partial(_read, file, name, dtype, shape),
            source=file,
            load_rows=partial(_read_rows, file, name) if shape else None,
            map=partial(_map, openers[file], file, name) if shape.numel() else None,
            mappable=mappable,
        )
    return found


def read_header(file: Path) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """Tensor name -> dtype and shape, in the order of the header.

    Raises:
        CheckpointError: if the file cannot be read or is not such a file.
    """
    found = {}
    try:
        with open_plain(file) as handle:  # a pipe would wait for ever
            length = int.from_bytes(handle.read(8), "little")
            text = handle.read(min(length, _MOST_HEADER_BYTES))
        if len(text) != length or not length:
            size = file.stat().st_size
            raise ValueError(f"{size} bytes cannot hold a header of {length} bytes")
        content = parse_json(text)
        with safe_open(file, framework="pt"):
            content.pop("__metadata__", None)
        for name, item in content.items():
            if set(item) != {"dtype", "shape", "data_offsets"}:
                raise ValueError(f"{name}: expected the keys dtype, shape and data_offsets")
            if item["dtype"] not in DTYPES:
                raise ValueError(f"{name}: dtype {item['dtype']!r} is unknown")
            found[name] = DTYPES[item["dtype"]], torch.Size(item["shape"])
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise CheckpointError(
            f"{file}: cannot be read as safetensors: {reason}; it is damaged or cut short"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read as safetensors: {error}") from error
    return found


def _read(file: Path, name: str, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    whole = torch.empty(shape, dtype=dtype)
    if whole.nbytes:
        lines = whole.view(shape[0] if shape else 1, -1)
        rows = max(1, _PART_BYTES * len(lines) // whole.nbytes)
        for start in range(0, len(lines), rows):
            stop = min(start + rows, len(lines))
            lines[start:stop] = _read_rows(file, name, start, stop).view(stop - start, -1)
    return whole


def _read_rows(file: Path, name: str, start: int, stop: int) -> Tensor:
    try:
        with safe_open(file, framework="pt") as handle:
            stored = handle.get_slice(name)
            rows: Tensor = stored[start:stop] if stored.get_shape() else stored[...]
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{file}: {name} cannot be read: {error}") from error
    return rows


def _map(open_file: Callable[[], Any], file: Path, name: str) -> Tensor:
    """In pages that processes share and can be evicted, read from the disk when this returns: many
    at a time, and an error of the disk is an error here, where a later touch would be a signal."""
    try:
        mapped: Tensor = open_file().get_tensor(name)
        if sys.platform == "linux":
            start = mapped.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
            size = mapped.data_ptr() + mapped.nbytes - start
            # releases the GIL, which mmap.madvise does not
            madvise = ctypes.CDLL(None, use_errno=True).madvise
            populate = ctypes.c_void_p(start), ctypes.c_size_t(size), _MADV_POPULATE_READ
            code = ctypes.get_errno() if madvise(*populate) else 0
            if code not in (0, errno.EINVAL):  # an older kernel
                raise OSError("it has shrunk" if code == errno.EFAULT else os.strerror(code))
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{file}: {name} cannot be read: {error}") from error
    # kernels expect elements where the alignment of their type has them
    return mapped if mapped.data_ptr() % mapped.dtype.itemsize == 0 else mapped.clone()


def stream(
    tensors: Sequence[LazyTensor],
    consume: Callable[[LazyTensor, Tensor], None],
    *,
    transient: Callable[[LazyTensor], bool],
) -> None:
    """Call `consume` with every tensor, in the order given, in this thread.

    Others are loaded meanwhile: at most `READERS` of them, and only while all that is loaded and
    not consumed, this one included, is no larger than the largest tensor. Tensors that are
    `transient` (what `consume` keeps of them is other memory) are pages of their file.
    """
    budget = max((tensor.nbytes for tensor in tensors), default=0)
    waiting = deque(tensors)
    loading: deque[tuple[LazyTensor, Future[Tensor]]] = deque()
    in_memory = 0
    with ThreadPoolExecutor(READERS) as pool:
        try:
            while waiting or loading:
                while (
                    waiting
                    and len(loading) <= READERS
                    and (not loading or in_memory + waiting[0].nbytes <= budget)
                ):
                    tensor = waiting.popleft()
                    in_memory += tensor.nbytes
                    mapped = tensor.map if tensor.mappable or transient(tensor) else None
                    loading.append((tensor, pool.submit(mapped or tensor.load)))
                tensor, future = loading.popleft()
                consume(tensor, future.result())
                del future
                in_memory -= tensor.nbytes
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def is_finite(tensor: Tensor) -> bool:
    """No NaN or infinity, in a tensor of any floating dtype.

    On CPUs by the bits: 0.19 s for 415 MB of bfloat16 on two busy cores, where `torch.aminmax`
    takes 1.0 s and `torch.isfinite(...).all()` 9 s.
    """
    tensor = tensor.detach()
    if tensor.numel() == 0:
        return True
    if not tensor.is_cpu or tensor.dtype not in _BITS:
        return bool(torch.stack(tensor.aminmax()).isfinite().all())
    dtype, infinity = _BITS[tensor.dtype]
    bits = tensor.view(dtype).numpy()
    unsigned = bits.view(f"u{bits.dtype}")  # in which negative numbers are the larger ones
    sign = 1 << (8 * bits.dtype.itemsize - 1)
    return int(bits.max()) < infinity and int(unsigned.max()) < sign + infinity


# ---- out ----------------------------------------------------------------------------------------


def write_shards(
    tensors: Iterable[LazyTensor], directory: Path, *, max_shard_bytes: int, stem: str = STEM
) -> None:
    """Write `STEM.safetensors`, or shards with an index; one tensor is in memory at a time."""
    shards: list[list[LazyTensor]] = [[]]
    size = total = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
        total += tensor.nbytes
    if len(shards) == 1:
        write_file(shards[0], directory / f"{stem}.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(shard, directory / file)
        weight_map |= {tensor.name: file for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """As `write_file`, for tensors that exist already."""
    write_file(
        [LazyTensor(name, t.shape, t.dtype, partial(t.detach)) for name, t in tensors.items()], file
    )


def write_file(tensors: Iterable[LazyTensor], file: Path) -> None:
    """One safetensors file, each tensor loaded when its turn comes and dropped when written."""
    # the widest first, so that every tensor begins at a multiple of its element size
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        start, end = end, end + tensor.nbytes
        described = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape)}
        header[tensor.name] = described | {"data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)  # data begin at a cache line, for those who map the file
    with file.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            plain = tensor.load()
            assert (plain.shape, plain.dtype) == (tensor.shape, tensor.dtype), tensor.name
            handle.write(tensor_bytes(plain))
            del plain  # before the next is loaded
