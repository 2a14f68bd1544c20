"""From C sources to a loaded library that is kept for the next start.

It is kept in a folder that nobody but its owner can write, under a name that holds the SHA-256 of
its content: a library that was cut short, overwritten or left by a full disk is not loaded, which
could end the process with SIGBUS or SIGSEGV, but built anew. Where it cannot be kept it is built in
a temporary folder for this process alone.

Nothing can be changed between the check of a library and its loading: who could write the file or
the folder is the owner, and our own processes only ever put a whole file in the place of another.

The compiler runs for a bounded time and what it prints is read to a bound: whatever CC is, what
comes of it is a library or one readable `CompilerError`.

Environment: CC names the compiler, QLORA_BUILDERS_CACHE the folder (default: qlora_builders in
XDG_CACHE_HOME, else in .cache of the home folder).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import signal
import stat
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_MOST_BYTES = 64 << 20  # more is not read: the kernels have 45 KB
_KEPT = 1000  # bytes of what a command prints: a compiler's first complaint is the telling one


class CacheError(Exception):
    """A folder that keeps no library; the message names it and says why."""


class CompilerError(Exception):
    """No library; the message names CC and what happened."""


class _Failed(CompilerError):
    """Not for good: another way or place may do."""


@dataclass(frozen=True)
class Sources:
    """What a library is made of, and the functions that it must have then.

    Attributes:
        files: those named *.c are compiled; the others are headers.
        seconds: for one command of the compiler, and for all; it takes two on a machine at rest.
    """

    name: str
    files: Sequence[Path]
    flags: Sequence[str]
    functions: Sequence[str]
    seconds: tuple[float, float] = (60.0, 120.0)


def load_library(sources: Sources) -> ctypes.CDLL:
    """The library of these sources, compiled now if it is not kept from an earlier start.

    Warns once if it cannot be kept.

    Raises:
        CompilerError: if there is no library, naming CC and what happened.
    """
    compiler = _Compiler(sources)
    stem = f"{sources.name}_{_key(sources, compiler.words)}"
    problem: Exception
    try:
        folder = cache_folder()
        return _load_kept(folder, stem) or _build(sources, compiler, folder, stem)
    except (CacheError, _Failed) as error:  # also for a disk that is full there
        problem = error
    try:
        library = _build(sources, compiler)
    except CacheError as error:
        raise CompilerError(f"{error}; {problem}") from error
    _warn_not_kept(problem)
    return library


# ---- the folder ---------------------------------------------------------------------------------


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
    mode, owner, user = status.st_mode, status.st_uid, os.geteuid()
    for is_wrong, why in (
        (stat.S_ISLNK(mode), "is a link, which others could turn; name the folder itself"),
        (not stat.S_ISDIR(mode), "is not a folder"),
        (owner != user, f"belongs to user {owner}; you are user {user}"),
        (mode & _OTHERS_WRITE, f"has mode {mode & 0o7777:o}: others can write in it; chmod go-w"),
        # seen before compiling, where it would pass for a lack of OpenMP
        (no_programs, "is on a file system that is mounted noexec"),
    ):
        if is_wrong:
            raise CacheError(f"{folder} {why}")
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


def _key(sources: Sources, words: Sequence[str]) -> str:
    texts = [file.read_text() for file in sources.files]
    key = "\n".join([*texts, *sources.flags, *words, _cpu_identity(), torch.__version__])
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:16]


def _cpu_identity() -> str:
    """-march=native code must not run on another CPU that shares the home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kept = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    return "\n".join(sorted(set(kept)))


def _load_kept(folder: Path, stem: str) -> ctypes.CDLL | None:
    for file in sorted(folder.glob(f"{stem}_*.so")):
        if _is_whole(file):
            with suppress(OSError):  # of another machine, under the right name
                return ctypes.CDLL(str(file))
    return None


def _is_whole(file: Path) -> bool:
    """Whether a file is ours alone and has the content that its name tells."""
    careful = os.O_NOFOLLOW | os.O_NONBLOCK  # a link is not followed, a pipe not waited for
    try:
        with open(file, "rb", opener=lambda path, flags: os.open(path, flags | careful)) as opened:
            status = os.fstat(opened.fileno())
            if (
                not stat.S_ISREG(status.st_mode)
                or status.st_uid != os.geteuid()
                or status.st_mode & _OTHERS_WRITE
                or status.st_size > _MOST_BYTES
            ):
                return False
            digest = hashlib.sha256(opened.read()).hexdigest()
    except OSError:
        return False
    return digest == file.stem.rpartition("_")[2]


# ---- the library --------------------------------------------------------------------------------


def _build(
    sources: Sources, compiler: _Compiler, folder: Path | None = None, stem: str = ""
) -> ctypes.CDLL:
    """Compiled, loaded and, with `folder`, kept there: only what could be loaded is."""
    try:
        work = tempfile.TemporaryDirectory(
            prefix="qlora_builders_", dir=folder, ignore_cleanup_errors=True
        )
    except OSError as error:
        raise CacheError(f"{folder or 'temporary files'}: {error.strerror}") from error
    with work:
        made = compiler.compile(Path(work.name))
        library = compiler.load(made)
        missing = [name for name in sources.functions if not hasattr(library, name)]
        if missing:
            raise _Failed(f"what {compiler.name} wrote lacks {', '.join(missing)}")
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


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _warn_not_kept(problem: Exception | str) -> None:
    warnings.warn(
        f"the compiled CPU kernels cannot be kept, so each start compiles them again: {problem}; "
        "set QLORA_BUILDERS_CACHE to a folder that only you can write",
        stacklevel=2,
    )


class _Compiler:
    """CC as it is set now. All its commands together have the second of `Sources.seconds`.

    Raises:
        CompilerError: if CC has no words.
    """

    def __init__(self, sources: Sources) -> None:
        value = os.environ.get("CC")
        self.name = "'cc' (CC is not set)" if value is None else f"CC={value!r}"
        self._sources = sources
        self._end = time.monotonic() + sources.seconds[1]
        try:
            self.words = shlex.split("cc" if value is None else value)
        except ValueError as error:
            raise CompilerError(f"{self.name} cannot be split into words: {error}") from error
        if not self.words:
            raise CompilerError(f"{self.name} is empty")

    def compile(self, folder: Path) -> Path:
        """Path of a shared library in `folder`.

        To objects with OpenMP, then linked without it, so that torch's OpenMP serves them. A second
        OpenMP library in the process would bring its own, competing threads. Compilers without
        OpenMP give a library that works in one thread.
        """
        library, flags = folder / "library.so", self._sources.flags
        sources = [file for file in self._sources.files if file.suffix == ".c"]
        try:
            # where the compiler's own temporary files lie, so that a full disk around `library`
            # does not pass for a lack of OpenMP
            scratch = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        except OSError as error:
            raise CacheError(f"temporary files: {error.strerror}") from error
        with scratch:
            objects = [Path(scratch.name) / f"{source.stem}.o" for source in sources]
            to_object = [*(flag for flag in flags if flag != "-shared"), "-fopenmp", "-c"]
            try:
                for source, made in zip(sources, objects, strict=True):
                    self._run([*to_object, source, "-o", made])
            except _Failed:  # no OpenMP, or nothing works
                objects = []
            if objects:
                self._run(["-shared", *objects, "-o", library])
                with suppress(_Failed):  # torch brings no OpenMP that can be used
                    self.load(library, mode=os.RTLD_NOW)
                    return library
        self._run([*flags, "-Wno-unknown-pragmas", *sources, "-o", library])
        return library

    def load(self, library: Path, *, mode: int = ctypes.DEFAULT_MODE) -> ctypes.CDLL:
        """What was compiled, if it is a library that this process can load."""
        if library.is_symlink() or not library.is_file():  # opening a pipe would wait for ever
            raise _Failed(f"{self.name} ended with exit code 0, but wrote no library")
        try:
            return ctypes.CDLL(str(library), mode=mode)
        except OSError as error:
            raise _Failed(f"what {self.name} wrote cannot be loaded: {error}") from error

    def _run(self, arguments: Sequence[str | Path]) -> None:
        """One command; the processes that it started are ended with it."""
        each, total = self._sources.seconds
        seconds = min(each, self._end - time.monotonic())
        if seconds <= 0:
            raise CompilerError(f"{self.name} took more than {total:g} seconds in all")
        try:
            process = subprocess.Popen(
                [*self.words, *arguments],
                bufsize=0,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise _Failed(f"{self.name} cannot be run: {error.strerror}") from error
        printed = bytearray()
        reader = threading.Thread(target=_read, args=(process.stdout, printed), daemon=True)
        reader.start()
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise CompilerError(
                f"{self.name} did not end within {seconds:.3g} seconds and was stopped"
            ) from error
        finally:
            with suppress(ProcessLookupError, PermissionError):  # none is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            reader.join(1)  # a child that left the group may hold the pipe
        if code:
            ending = f"ended with exit code {code}" if code > 0 else f"was ended by signal {-code}"
            raise _Failed(f"{self.name} {ending}{_readable(printed)}")


def _read(pipe: IO[bytes], printed: bytearray) -> None:
    """The start of what a process prints; the rest is read and dropped."""
    with pipe:
        while part := pipe.read(1 << 16):
            printed += part[: _KEPT - len(printed)]


def _readable(printed: bytearray) -> str:
    lines = printed.decode(errors="replace").splitlines()
    kept = ("".join(c if c.isprintable() else "?" for c in line).rstrip() for line in lines)
    text = "\n".join(line for line in kept if line)
    return f": {text}" if text else " and printed nothing"
