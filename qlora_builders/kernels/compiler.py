"""Runs the C compiler that CC names (default cc): for a bounded time, reading bounded output.

Whatever CC is, what comes of it is a library or one readable `CompilerError`.
"""

from __future__ import annotations

import ctypes
import os
import selectors
import shlex
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_KEPT = 1000  # bytes of what a command prints: a compiler's first complaint is the telling one
_LOOK_EVERY = 0.05  # seconds, for a command that has ended while a child of it holds the pipe


class CompilerError(Exception):
    """No library; the message names CC and what happened."""


class CompilerTimeoutError(CompilerError):
    """A command did not end in time."""


@dataclass(frozen=True)
class TimeLimit:
    """Seconds for one command and for all of them; the kernels take two on a machine at rest."""

    each: float = 60.0
    total: float = 120.0


class Compiler:
    """CC as it is set now; its commands share `limit.total` from here on.

    Raises:
        CompilerError: if CC has no words.
    """

    def __init__(self, limit: TimeLimit) -> None:
        value = os.environ.get("CC")
        self.name = "'cc' (CC is not set)" if value is None else f"CC={value!r}"
        self._limit = limit
        self._end = time.monotonic() + limit.total
        try:
            self.words = shlex.split("cc" if value is None else value)
        except ValueError as error:
            raise CompilerError(f"{self.name} cannot be split into words: {error}") from error
        if not self.words:
            raise CompilerError(f"{self.name} is empty")

    def compile(self, sources: Sequence[Path], flags: Sequence[str], folder: Path) -> Path:
        """Path of a shared library in `folder`.

        To objects with OpenMP, then linked without it, so that torch's OpenMP serves them. A second
        OpenMP library in the process would bring its own, competing threads. Compilers without
        OpenMP give a library that works in one thread.

        Raises:
            CompilerError: if there is none.
        """
        library = folder / "library.so"
        if self._link_with_openmp(library, sources, flags):
            with suppress(CompilerError):  # torch brings no OpenMP that can be used
                self.load(library, mode=os.RTLD_NOW)
                return library
        self._run([*flags, "-Wno-unknown-pragmas", *sources, "-o", library])
        return library

    def _link_with_openmp(
        self, library: Path, sources: Sequence[Path], flags: Sequence[str]
    ) -> bool:
        """False if the objects cannot be made: no OpenMP, or nothing works.

        They lie where the compiler's own temporary files do, so that a full disk around `library`
        does not pass for a lack of OpenMP.
        """
        to_object = [*(flag for flag in flags if flag != "-shared"), "-fopenmp", "-c"]
        try:
            scratch = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        except OSError as error:
            raise CompilerError(f"there is no folder for temporary files: {error}") from error
        with scratch:
            objects = [Path(scratch.name) / f"{source.stem}.o" for source in sources]
            try:
                for source, made in zip(sources, objects, strict=True):
                    self._run([*to_object, source, "-o", made])
            except CompilerTimeoutError:
                raise
            except CompilerError:
                return False
            self._run(["-shared", *objects, "-o", library])
        return True

    def load(self, library: Path, *, mode: int = ctypes.DEFAULT_MODE) -> ctypes.CDLL:
        """Load what `compile` made.

        Raises:
            CompilerError: if that is no library which this process can load.
        """
        if not _is_plain_file(library):  # opening a pipe would wait for ever
            raise CompilerError(f"{self.name} ended with exit code 0, but wrote no library")
        try:
            return ctypes.CDLL(str(library), mode=mode)
        except OSError as error:
            text = f"what {self.name} wrote cannot be loaded: {error}"
            raise CompilerError(text) from error

    def _run(self, arguments: Sequence[str | Path]) -> None:
        """One command; the processes that it started are ended with it."""
        seconds = min(self._limit.each, self._end - time.monotonic())
        if seconds <= 0:
            raise CompilerTimeoutError(
                f"{self.name} took more than {self._limit.total:g} seconds in all"
            )
        try:
            process = subprocess.Popen(
                [*self.words, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise CompilerError(f"{self.name} cannot be run: {error.strerror}") from error
        with process:
            try:
                printed = _watch(process, seconds)
            except subprocess.TimeoutExpired as error:
                raise CompilerTimeoutError(
                    f"{self.name} did not end within {seconds:.3g} seconds and was stopped"
                ) from error
            finally:
                with suppress(ProcessLookupError, PermissionError):  # none is left
                    os.killpg(process.pid, signal.SIGKILL)
        if process.returncode:
            raise CompilerError(f"{self.name} {_ending(process.returncode)}{_readable(printed)}")


def _is_plain_file(path: Path) -> bool:
    """Not a link, folder or pipe; False for what is not there."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _watch(process: subprocess.Popen[bytes], seconds: float) -> bytes:
    """The start of what a process prints until it ends; the rest is read and dropped."""
    assert process.stdout is not None
    printed = b""
    end = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while (left := end - time.monotonic()) > 0:
            ended = process.poll() is not None
            if selector.select(0 if ended else min(left, _LOOK_EVERY)):
                part = os.read(process.stdout.fileno(), 1 << 16)
                printed += part[: _KEPT - len(printed)]
                if not part:
                    process.wait(left)
                    return printed
                ended = ended and len(printed) == _KEPT
            if ended:
                return printed
    raise subprocess.TimeoutExpired(process.args, seconds)


def _ending(code: int) -> str:
    return f"ended with exit code {code}" if code > 0 else f"was ended by signal {-code}"


def _readable(printed: bytes) -> str:
    lines = printed.decode(errors="replace").splitlines()
    kept = ("".join(c if c.isprintable() else "?" for c in line).rstrip() for line in lines)
    text = "\n".join(line for line in kept if line)
    return f": {text}" if text else " and printed nothing"
