"""Safetensors directories: read one tensor at a time, write one shard at a time, never half.

A reader opens the file anew for every tensor. Parsing the header again costs well under a
millisecond, and closing the file unmaps the pages that were read, so resident memory stays at one
tensor however large the file is.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qlora_builders.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class LazyTensor:
    """A tensor to be written: what the writer must know beforehand, and how to get it."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


def find_tensors(directory: Path) -> dict[str, Path]:
    """Tensor name -> file, for a single-file or sharded checkpoint directory.

    Raises:
        CheckpointError: if there is no checkpoint, a shard is missing, or the index points outside
            the directory.
    """
    index = directory / INDEX_FILE
    if index.is_file():
        try:
            weight_map = dict(json.loads(index.read_text())["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{index}: not a safetensors index: {error!r}") from error
        for name, file in weight_map.items():
            if Path(str(file)).name != file:
                raise CheckpointError(
                    f"{index}: {name} points to {file!r}; shards must lie beside the index"
                )
        missing = sorted({f for f in weight_map.values() if not (directory / f).is_file()})
        if missing:
            raise CheckpointError(f"{index}: shards missing: {', '.join(missing)}; download again")
        return {name: directory / file for name, file in weight_map.items()}
    single = directory / SINGLE_FILE
    if not single.is_file():
        raise CheckpointError(
            f"{directory}: neither {SINGLE_FILE} nor {INDEX_FILE} there; "
            "expected a Hugging Face directory with safetensors weights"
        )
    return dict.fromkeys(tensor_names(single), single)


def tensor_names(file: Path) -> list[str]:
    with _open(file) as handle:
        return list(handle.keys())


def read_tensor(file: Path, name: str) -> Tensor:
    """One tensor, memory-mapped: its pages are released when it is."""
    with _open(file) as handle:
        if name not in handle.keys():  # noqa: SIM118 - not a mapping
            raise CheckpointError(f"{file}: no tensor {name!r}, though the index names it here")
        return handle.get_tensor(name)


@contextmanager
def _open(file: Path) -> Iterator[safe_open]:
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: cannot be read as safetensors: {error}") from error


def write_shards(tensors: Iterable[LazyTensor], directory: Path, *, max_shard_bytes: int) -> None:
    """Write `model.safetensors`, or shards with an index; at most one shard is in memory."""
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
        file = SINGLE_FILE
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors({tensor.name: tensor.load() for tensor in shard}, directory / file)
        weight_map.update({tensor.name: file for tensor in shard})
    if len(shards) > 1:
        total = sum(tensor.nbytes for shard in shards for tensor in shard)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def write_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, file, metadata={"format": "pt"})
    file.chmod(0o666 & ~_umask())  # safetensors makes it private


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
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be written: {error}") from error


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
