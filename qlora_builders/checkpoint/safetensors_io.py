"""Safetensors directories: read one tensor at a time, write one tensor at a time, never half.

A tensor is read straight into the memory that it will occupy. Files are mapped only where the
caller knows that nobody changes them in place (see `mapped_file.py`).
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qlora_builders.checkpoint.mapped_file import MappedFile
from qlora_builders.checkpoint.safetensors_header import Entry, read_header, write_header
from qlora_builders.errors import CheckpointError
from qlora_builders.files.reading import read_json_object
from qlora_builders.tensor.layouts import tensor_bytes

STEM = "model"  # model.safetensors, or model-00001-of-00002.safetensors with an index
MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file or to be written: what must be known beforehand, and how to get it.

    `quantized` names the type of weight that `load` gives, where it gives no plain one; `shape` and
    `dtype` are those of the weight it stands for. `load_into`, where there is one, loads into
    memory of the caller's, uint8 [nbytes]. `load_rows(start, stop)`, where the file allows it,
    reads a part; `map` gives it as pages of the file. `source` is the file it comes from, for error
    messages.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    load: Callable[[], Tensor]
    source: Path | None = None
    quantized: str = ""
    load_into: Callable[[Tensor], Tensor] | None = None
    load_rows: Callable[[int, int], Tensor] | None = None
    map: Callable[[], Tensor] | None = None

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


# ---- in -----------------------------------------------------------------------------------------


def find_tensors(directory: Path, *, stem: str = STEM) -> dict[str, Path]:
    """Tensor name -> file, for a single-file or sharded checkpoint directory.

    Raises:
        CheckpointError: if there is no checkpoint, a shard is missing, or the index points outside
            the directory.
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
        missing = sorted({f for f in weight_map.values() if not _is_file(directory / f)})
        if missing:
            raise CheckpointError(f"{index}: shards missing: {listed(missing)}; download again")
        return {name: directory / file for name, file in weight_map.items()}
    single = directory / f"{stem}.safetensors"
    if not single.is_file():
        raise CheckpointError(
            f"{directory}: neither {single.name} nor {index.name} there; expected a directory "
            f"with safetensors weights, got {listed(sorted(f.name for f in directory.iterdir()))}"
        )
    return dict.fromkeys(tensor_names(single), single)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # no file can have so long a name
        return False


def open_tensors(
    directory: Path, *, stem: str = STEM, mappable: bool = False
) -> dict[str, LazyTensor]:
    """Every tensor of such a directory; headers are read and checked, tensors are not.

    Args:
        mappable: nobody changes these files in place; the tensors can be mapped.

    Raises:
        CheckpointError: as `find_tensors` and `read_header`, or for a shard without a tensor that
            the index expects in it.
    """
    files = find_tensors(directory, stem=stem)
    headers = {file: read_header(file) for file in dict.fromkeys(files.values())}
    mapped = {file: MappedFile(file) for file in headers}
    found = {}
    for name, file in files.items():
        if name not in headers[file]:
            index = directory / f"{stem}.safetensors.index.json"
            raise CheckpointError(f"{file}: no tensor {name!r}, though {index} names it here")
        entry = headers[file][name]
        load = partial(_read, file, name, entry)
        rows = partial(_read_rows, file, name, entry) if entry.shape else None
        is_mapped = mappable and entry.nbytes > 0 and entry.start % entry.dtype.itemsize == 0
        found[name] = LazyTensor(
            name,
            entry.shape,
            entry.dtype,
            load,
            source=file,
            load_into=load,
            load_rows=rows,
            map=partial(_map, mapped[file], name, entry) if is_mapped else None,
        )
    return found


def tensor_names(file: Path) -> list[str]:
    return list(read_header(file))


def read_tensor(file: Path, name: str) -> Tensor:
    """One tensor, in memory of its own.

    Raises:
        CheckpointError: if the file cannot be read or has no such tensor.
    """
    header = read_header(file)
    if name not in header:
        raise CheckpointError(f"{file}: no tensor {name!r}; it holds {listed(sorted(header))}")
    return _read(file, name, header[name])


def _read(file: Path, name: str, entry: Entry, buffer: Tensor | None = None) -> Tensor:
    if buffer is None:
        buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
    view, position = buffer.numpy().data, 0
    try:
        with file.open("rb", buffering=0) as handle:
            handle.seek(entry.start)
            while position < entry.nbytes:  # one call reads 2 GiB at most
                count = handle.readinto(view[position:])
                if not count:
                    raise OSError("the file ends within the tensor")
                position += count
    except OSError as error:
        raise CheckpointError(f"{file}: {name} cannot be read: {error}") from error
    return buffer.view(entry.dtype).view(entry.shape)


def _read_rows(file: Path, name: str, entry: Entry, start: int, stop: int) -> Tensor:
    row = Entry(entry.dtype, entry.shape[1:], 0).nbytes
    shape = torch.Size((stop - start, *entry.shape[1:]))
    return _read(file, name, Entry(entry.dtype, shape, entry.start + start * row))


def _map(mapped: MappedFile, name: str, entry: Entry) -> Tensor:
    try:
        return mapped.bytes(entry.start, entry.nbytes).view(entry.dtype).view(entry.shape)
    except OSError as error:
        raise CheckpointError(f"{mapped.file}: {name} cannot be read: {error}") from error


# ---- out ----------------------------------------------------------------------------------------


def write_shards(
    tensors: Iterable[LazyTensor], directory: Path, *, max_shard_bytes: int, stem: str = STEM
) -> None:
    """Write `STEM.safetensors`, or shards with an index; one tensor is in memory at a time."""
    shards: list[list[LazyTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{stem}.safetensors"
        if len(shards) > 1:
            file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(shard, directory / file)
        weight_map.update({tensor.name: file for tensor in shard})
    if len(shards) > 1:
        total = sum(tensor.nbytes for shard in shards for tensor in shard)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / f"{stem}.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n"
        )


def write_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """As `write_file`, for tensors that exist already."""
    write_file(
        [LazyTensor(name, t.shape, t.dtype, partial(t.detach)) for name, t in tensors.items()], file
    )


def write_file(tensors: Iterable[LazyTensor], file: Path) -> None:
    """One safetensors file, each tensor loaded when its turn comes and dropped when written."""
    # the widest first, so that every tensor begins at a multiple of its element size
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header = write_header([(t.name, t.dtype, t.shape) for t in ordered], {"format": "pt"})
    with file.open("wb") as handle:
        handle.write(header)
        for tensor in ordered:
            plain = tensor.load()
            assert (plain.shape, plain.dtype) == (tensor.shape, tensor.dtype), tensor.name
            handle.write(tensor_bytes(plain))
            del plain  # before the next is loaded


@contextmanager
def atomic_directory(path: str | Path, *, marker: str) -> Iterator[Path]:
    """A temporary directory that becomes `path` when the block ends well and vanishes otherwise.

    Files are synced before the rename, and the rename after it. An older directory of that name is
    replaced, but only one that this could have written: without folders, and empty or holding
    `marker`. At every moment one of the two is on the disk whole.

    Args:
        marker: a file that every directory of this kind has.

    Raises:
        CheckpointError: if `path` is something that must not be replaced, or cannot be written.
    """
    path = Path(path).absolute()
    _check_replaceable(path, marker)
    try:
        _make_parents(path)
        temporary = _hidden_sibling(path, ".partial")
        try:
            temporary.chmod(0o777 & ~_umask())
            yield temporary
            for file in temporary.iterdir():
                _sync(file)
            _sync(temporary)
            _replace_directory(temporary, path)
            _sync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or error  # without the names of temporary files
        raise CheckpointError(f"{path}: cannot be written: {reason}") from error


def remove_directory(path: Path) -> None:
    """Remove a directory so that it is never seen under its name with some of its files gone."""
    condemned = _hidden_sibling(path, ".partial")
    path.rename(condemned)
    shutil.rmtree(condemned)


def clean_up(parent: Path) -> None:
    """Remove what processes that died left half-written or half-removed in `parent`, and put back
    what they had moved away. No other process may be writing there."""
    for left in sorted(parent.glob(".*.old")):
        path = parent / left.name[1:].rsplit(".", 2)[0]  # .NAME.RANDOM.old
        if not path.exists():
            left.rename(path)
        else:
            shutil.rmtree(left)
    for left in parent.glob(".*.partial"):
        shutil.rmtree(left)


def _check_replaceable(path: Path, marker: str) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise CheckpointError(f"{path}: is a file; give the path of a directory to write")
    names = sorted(entry.name for entry in path.iterdir())
    folders = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    if folders or (names and marker not in names):
        raise CheckpointError(
            f"{path}: exists and would be replaced, but it is not a directory that this writes "
            f"(it holds {listed(folders or names)}); give another path"
        )


def _make_parents(path: Path) -> None:
    """Like `mkdir -p` of the parent, on disk when it returns."""
    missing = list(itertools.takewhile(lambda parent: not parent.exists(), path.parents))
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        _sync(folder.parent)


def _hidden_sibling(path: Path, suffix: str) -> Path:
    """An empty directory beside `path`, so that a rename between them is one step."""
    return Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=suffix, dir=path.parent))


def _replace_directory(new: Path, path: Path) -> None:
    """Give `new` the name `path`; afterwards an old directory of that name is called `new`."""
    if not path.exists():
        new.rename(path)
    elif not _exchange(new, path):
        old = _hidden_sibling(path, ".old")
        path.rename(old)  # clean_up puts it back if we die before the next line
        new.rename(path)
        old.rename(new)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step (renameat2); False where the system or file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    at_cwd, rename_exchange = -100, 2
    done: int = renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), rename_exchange)
    return done == 0


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def listed(names: Sequence[str]) -> str:
    """The first names of a long list, for an error message."""
    shown = ", ".join(names[:8]) or "none"
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")
