"""From C sources to a loaded library that is kept for the next start.

It is kept in a folder that nobody but its owner can write, under a name that holds the SHA-256 of
its content: a library that was cut short, overwritten or left by a full disk is not loaded, which
could end the process with SIGBUS or SIGSEGV, but built anew. Where it cannot be kept it is built in
a temporary folder for this process alone.

Nothing can be changed between the check of a library and its loading: who could write the file or
the folder is the owner, and our own processes only ever put a whole file in the place of another.

The compiler runs for a bounded time and what it prints is read to a bound: whatever CC is, what
comes of it is a library or one readable `BuildError`.

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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_MOST_BYTES = 64 << 20  # more is not read: the kernels have 45 KB
_KEPT = 1000  # bytes of what a command prints: a compiler's first complaint is the telling one


class BuildError(Exception):
    """No library; the message names CC, or the folder, and says what happened."""


class _Elsewhere(BuildError):
    """Not for good: another way or place may do."""


@dataclass
class Library:
    """
    Attributes:
        files: those named *.c are compiled; the others are headers.
        functions: what the library must have.
        seconds: for one command of the compiler, and for all; it takes two on a machine at rest.
    """

    name: str
    files: Sequence[Path]
    flags: Sequence[str]
    functions: Sequence[str]
    seconds: tuple[float, float] = (60.0, 120.0)

    def load(self) -> ctypes.CDLL:
        """The library, compiled now if it is not kept from an earlier start.

        Warns once if it cannot be kept.

        Raises:
            BuildError: if there is none.
        """
        self._read_cc()
        try:
            folder = cache_folder()
            return _load_kept(folder, self._stem()) or self._build(folder)
        except _Elsewhere as error:  # also for a disk that is full there
            problem = error
        try:
            library = self._build()
        except _Elsewhere as error:
            texts = dict.fromkeys((str(error), str(problem)))
            raise BuildError("; ".join(texts)) from error
        _warn_not_kept(problem)
        return library

    def _read_cc(self) -> None:
        value = os.environ.get("CC")
        self._cc = "'cc' (CC is not set)" if value is None else f"CC={value!r}"
        self._end = time.monotonic() + self.seconds[1]
        try:
            self._words = shlex.split("cc" if value is None else value)
        except ValueError as error:
            raise BuildError(f"{self._cc} cannot be split into words: {error}") from error
        if not self._words:
            raise BuildError(f"{self._cc} is empty")

    def _stem(self) -> str:
        """The name of kept libraries, without the hash of their content."""
        texts = [file.read_text() for file in self.files]
        key = "\n".join([*texts, *self.flags, *self._words, _cpu_identity(), torch.__version__])
        digest = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()
        return f"{self.name}_{digest[:16]}"

    def _build(self, folder: Path | None = None) -> ctypes.CDLL:
        """Compiled, loaded and, with `folder`, kept there: only what could be loaded is."""
        with _temporary(folder) as work:
            made = self._compile(work)
            library = self._open(made)
            missing = [name for name in self.functions if not hasattr(library, name)]
            if missing:
                raise _Elsewhere(f"what {self._cc} wrote lacks {', '.join(missing)}")
            if folder is not None:
                try:
                    _keep(made, folder, self._stem())
                except OSError as error:
                    _warn_not_kept(f"{error.filename2 or folder}: {error.strerror}")
        return library

    def _compile(self, folder: Path) -> Path:
        """Path of a shared library in `folder`.

        To objects with OpenMP, then linked without it, so that torch's OpenMP serves them. A second
        OpenMP library in the process would bring its own, competing threads. Compilers without
        OpenMP give a library that works in one thread.
        """
        library = folder / "library.so"
        sources = [file for file in self.files if file.suffix == ".c"]
        to_object = [*(flag for flag in self.flags if flag != "-shared"), "-fopenmp", "-c"]
        # where the compiler's own temporary files lie, so that a full disk around `library` does
        # not pass for a lack of OpenMP
        with _temporary() as scratch:
            objects = [scratch / f"{source.stem}.o" for source in sources]
            try:
                for source, made in zip(sources, objects, strict=True):
                    self._run([*to_object, source, "-o", made])
            except _Elsewhere:  # no OpenMP, or nothing works
                objects = []
            if objects:
                self._run(["-shared", *objects, "-o", library])
                with suppress(_Elsewhere):  # torch brings no OpenMP that can be used
                    self._open(library, mode=os.RTLD_NOW)
                    return library
        self._run([*self.flags, "-Wno-unknown-pragmas", *sources, "-o", library])
        return library

    def _open(self, made: Path, *, mode: int = ctypes.DEFAULT_MODE) -> ctypes.CDLL:
        if made.is_symlink() or not made.is_file():  # opening a pipe would wait for ever
            raise _Elsewhere(f"{self._cc} ended with exit code 0, but wrote no library")
        try:
            return ctypes.CDLL(str(made), mode=mode)
        except OSError as error:
            raise _Elsewhere(f"what {self._cc} wrote cannot be loaded: {error}") from error

    def _run(self, arguments: Sequence[str | Path]) -> None:
        """One command; the processes that it started are ended with it."""
        each, total = self.seconds
        seconds = min(each, self._end - time.monotonic())
        if seconds <= 0:
            raise BuildError(f"{self._cc} took more than {total:g} seconds in all")
        try:
            process = subprocess.Popen(
                [*self._words, *arguments],
                bufsize=0,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise _Elsewhere(f"{self._cc} cannot be run: {error.strerror}") from error
        printed = bytearray()
        reader = threading.Thread(target=_read, args=(process.stdout, printed), daemon=True)
        reader.start()
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise BuildError(
                f"{self._cc} did not end within {seconds:.3g} seconds and was stopped"
            ) from error
        finally:
            with suppress(ProcessLookupError, PermissionError):  # none is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            reader.join(1)  # a child that left the group may hold the pipe
        if code:
            ending = f"ended with exit code {code}" if code > 0 else f"was ended by signal {-code}"
            raise _Elsewhere(f"{self._cc} {ending}{_readable(printed)}")


@contextmanager
def _temporary(folder: Path | None = None) -> Iterator[Path]:
    """A folder of our own, here or where temporary files lie."""
    try:
        made = tempfile.TemporaryDirectory(
            prefix="qlora_builders_", dir=folder, ignore_cleanup_errors=True
        )
    except OSError as error:
        raise _Elsewhere(f"{folder or 'temporary files'}: {error.strerror}") from error
    with made as path:
        yield Path(path)


def _keep(made: Path, folder: Path, stem: str) -> None:
    made.chmod(0o700)
    with made.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    os.replace(made, folder / f"{stem}_{digest}.so")  # another process may do the same


def _warn_not_kept(problem: Exception | str) -> None:
    warnings.warn(
        f"the compiled CPU kernels cannot be kept, so each start compiles them again: {problem}; "
        "set QLORA_BUILDERS_CACHE to a folder that only you can write",
        stacklevel=2,
    )


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


# ---- the folder ---------------------------------------------------------------------------------


def cache_folder() -> Path:
    """The folder of kept libraries, made if need be.

    Raises:
        BuildError: if there is none, or others could write in it.
    """
    folder = _chosen_folder()
    try:
        folder = folder.absolute()  # without a slash it would be sought where libraries are
        with suppress(FileExistsError):  # a file or a link, which is said below
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.lstat()
        no_programs = os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0)
    except OSError as error:
        raise _Elsewhere(f"{folder}: {error.strerror}") from error
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
            raise _Elsewhere(f"{folder} {why}")
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
        raise _Elsewhere(
            f"there is no home folder: HOME is not set and user {os.getuid()} has no entry "
            "in the password database"
        ) from error
    if not (home.is_absolute() and os.path.isdir(home)):  # never made here
        raise _Elsewhere(f"the home folder {str(home)!r} (HOME) is not there")
    return home / ".cache" / "qlora_builders"


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
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError:
        return False
    return digest == file.stem.rpartition("_")[2]


def _cpu_identity() -> str:
    """-march=native code must not run on another CPU that shares the home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kept = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    return "\n".join(sorted(set(kept)))
