"""From C sources to a loaded library that is kept for the next start.

It is kept in a folder that nobody but its owner can write, under a name that holds the SHA-256 of
its content: a library that was cut short, overwritten or left by a full disk is not loaded, which
could end the process with SIGBUS or SIGSEGV, but built anew. Where it cannot be kept it is built in
a temporary folder for this process alone.

Nothing can be changed between the check of a library and its loading: who could write the file or
the folder is the owner, and our own processes only ever put a whole file in the place of another.

Environment: CC names the compiler, QLORA_BUILDERS_CACHE the folder (default: qlora_builders in
XDG_CACHE_HOME, else in .cache of the home folder).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import stat
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from qlora_builders.kernels.compiler import (
    Compiler,
    CompilerError,
    CompilerTimeoutError,
    TimeLimit,
)

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_MOST_BYTES = 64 << 20  # more is not read: the kernels have 45 KB


class CacheError(Exception):
    """A folder that keeps no library; the message names it and says why."""


@dataclass(frozen=True)
class Sources:
    """What a library is made of, and the functions that it must have then."""

    name: str
    files: Sequence[Path]
    headers: Sequence[Path]
    flags: Sequence[str]
    functions: Sequence[str]


def load_library(sources: Sources, *, limit: TimeLimit | None = None) -> ctypes.CDLL:
    """The library of these sources, compiled now if it is not kept from an earlier start.

    Warns once if it cannot be kept.

    Raises:
        CompilerError: if there is no library, naming CC and what happened.
    """
    compiler = Compiler(limit or TimeLimit())
    stem = f"{sources.name}_{_key(sources, compiler)}"
    problem: CacheError | CompilerError
    try:
        folder = cache_folder()
        return _load_kept(folder, stem) or _build(sources, compiler, folder, stem)
    except CompilerTimeoutError:
        raise
    except (CacheError, CompilerError) as error:  # also for a disk that is full there
        problem = error
    try:
        library = _build(sources, compiler)
    except (CacheError, CompilerError) as error:
        text = str(error) if isinstance(problem, CompilerError) else f"{error}; {problem}"
        raise CompilerError(text) from error
    _warn_not_kept(problem if isinstance(problem, CacheError) else f"in {folder}: {problem}")
    return library


def cache_folder() -> Path:
    """The folder of kept libraries, made if need be.

    Raises:
        CacheError: if there is none, or others could write in it.
    """
    folder = _chosen_folder()
    try:
        folder = folder.absolute()  # without a slash it would be sought where libraries are
        with suppress(FileExistsError):  # a file or a link, which is said below
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.lstat()
        no_programs = os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0)
    except OSError as error:
        raise CacheError(f"{folder}: {error.strerror}") from error
    if stat.S_ISLNK(status.st_mode):
        raise CacheError(f"{folder} is a link, which others could turn; name the folder itself")
    if not stat.S_ISDIR(status.st_mode):
        raise CacheError(f"{folder} is not a folder")
    if status.st_uid != os.geteuid():
        raise CacheError(f"{folder} belongs to user {status.st_uid}; you are user {os.geteuid()}")
    if status.st_mode & _OTHERS_WRITE:
        mode = stat.S_IMODE(status.st_mode)
        raise CacheError(f"others can write in {folder} (mode {mode:o}); chmod go-w it")
    if no_programs:  # seen before compiling, where it would pass for a lack of OpenMP
        raise CacheError(f"{folder} is on a file system that is mounted noexec")
    return folder


def _chosen_folder() -> Path:
    chosen = os.environ.get("QLORA_BUILDERS_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # the XDG specification has others ignored
        return Path(base) / "qlora_builders"
    try:
        home = Path.home()
    except RuntimeError as error:
        raise CacheError(
            f"there is no home folder: HOME is not set and user {os.getuid()} has no entry "
            "in the password database"
        ) from error
    if not (home.is_absolute() and os.path.isdir(home)):  # never made here
        raise CacheError(f"the home folder {str(home)!r} (HOME) is not there")
    return home / ".cache" / "qlora_builders"


def _load_kept(folder: Path, stem: str) -> ctypes.CDLL | None:
    for file in sorted(folder.glob(f"{stem}_*.so")):
        if _is_whole(file):
            with suppress(OSError):  # of another machine, under the right name
                return ctypes.CDLL(str(file))
    return None


def _is_whole(file: Path) -> bool:
    """Whether a file is ours alone and has the content that its name tells."""
    try:
        # a link is not followed, a pipe not waited for
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not (
                stat.S_ISREG(status.st_mode)
                and status.st_uid == os.geteuid()
                and not status.st_mode & _OTHERS_WRITE
                and status.st_size <= _MOST_BYTES
            ):
                return False
            with open(descriptor, "rb", closefd=False) as opened:
                content = opened.read()
        finally:
            os.close(descriptor)
    except OSError:
        return False
    return hashlib.sha256(content).hexdigest() == file.stem.rpartition("_")[2]


def _build(
    sources: Sources, compiler: Compiler, folder: Path | None = None, stem: str = ""
) -> ctypes.CDLL:
    """Compiled, loaded and, with `folder`, kept there: only what could be loaded is."""
    try:
        work = tempfile.TemporaryDirectory(
            prefix="qlora_builders_", dir=folder, ignore_cleanup_errors=True
        )
    except OSError as error:
        raise CacheError(f"{folder or 'temporary files'}: {error.strerror}") from error
    with work:
        made = compiler.compile(sources.files, sources.flags, Path(work.name))
        library = compiler.load(made)
        missing = [name for name in sources.functions if not hasattr(library, name)]
        if missing:
            raise CompilerError(f"what {compiler.name} wrote lacks {', '.join(missing)}")
        if folder is not None:
            try:
                _keep(made, folder, stem)
            except OSError as error:
                _warn_not_kept(f"{error.filename2 or folder}: {error.strerror}")
    return library


def _keep(made: Path, folder: Path, stem: str) -> None:
    digest = hashlib.sha256(made.read_bytes()).hexdigest()
    made.chmod(0o700)
    _fsync(made)
    os.replace(made, folder / f"{stem}_{digest}.so")  # another process may do the same
    with suppress(OSError):  # some file systems have no fsync of folders
        _fsync(folder)


def _warn_not_kept(problem: CacheError | str) -> None:
    warnings.warn(
        f"the compiled CPU kernels cannot be kept, so each start compiles them again: {problem}; "
        "set QLORA_BUILDERS_CACHE to a folder that only you can write",
        stacklevel=2,
    )


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _key(sources: Sources, compiler: Compiler) -> str:
    texts = [file.read_text() for file in (*sources.files, *sources.headers)]
    key = "\n".join([*texts, *sources.flags, *compiler.words, _cpu_identity(), torch.__version__])
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:16]


def _cpu_identity() -> str:
    """-march=native code must not run on another CPU that shares the home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kept = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    return "\n".join(sorted(set(kept)))
