"""Directories that appear complete or not at all, and replace only what they could have written."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_builders.errors import CheckpointError, listed


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
