"""The process in which things are evaluated: `python -m qlora_builders.confined.worker`.

Requests come by stdin, answers go by stdout. The end of stdin is the end of the process, so that
none outlives its parent. The argument is the number of the pipe of `end_with`.

Limits are set anew for each request.
CPU time of all threads is bounded by a timer whose signal ends the process. `RLIMIT_CPU` would do
the same in whole seconds. Memory is bounded by `RLIMIT_AS`: address space, so threads and arenas of
the allocator count too; the parent sees to it that there are few. Linux enforces all of it. macOS
does not enforce `RLIMIT_AS`, so there a memory bomb ends by CPU time, or when the system has no
memory left.

A process that evaluates something does not see that its parent has ended, so the kernel tells it:
the parent holds the other end of a pipe in which nothing is ever written, and on Linux SIGIO, which
comes when that end closes, ends this process.
"""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from qlora_builders.confined.process import CHUNK, HEAD, LENGTHS, Request, WithBytes

_LONGEST_MESSAGE = 4000  # characters of an error
_STATM = Path("/proc/self/statm")  # pages; the first number is the address space


def end_with(pipe: int) -> None:
    """End this process when the other end of `pipe` closes."""
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETFL, os.O_ASYNC)


class Confinement:
    """`begin` and `end` around what is evaluated; between requests there are no limits."""

    def __init__(self) -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for number in (signal.SIGPROF, signal.SIGIO):
            signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
        self._statm = os.open(_STATM, os.O_RDONLY) if _STATM.exists() else None
        self._own = {
            kind: resource.getrlimit(kind) for kind in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE)
        }
        self._base = 0
        self.rebase()

    def rebase(self) -> None:
        """What is there now does not count against the next requests."""
        if self._statm is not None:
            pages = int(os.pread(self._statm, 64, 0).split()[0])
            self._base = pages * resource.getpagesize()

    def begin(self, seconds: float, memory: int) -> None:
        """From here on: `seconds` of CPU time, and `memory` bytes beside those of `rebase`."""
        signal.setitimer(signal.ITIMER_PROF, seconds)
        if self._statm is not None:
            self._limit(resource.RLIMIT_AS, self._base + memory)
        self._limit(resource.RLIMIT_FSIZE, 0)

    def end(self) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        for kind, own in self._own.items():
            resource.setrlimit(kind, own)

    def _limit(self, kind: int, value: int) -> None:
        """The soft limit; one that the user has set and is lower stays."""
        soft, hard = self._own[kind]
        known = [limit for limit in (value, soft) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(kind, (min(known), hard))


class _Worker:
    def __init__(self) -> None:
        self._confinement = Confinement()
        self._functions: dict[str, Callable[..., Any]] = {}
        self._kept: dict[int | None, Any] = {}

    def answer(
        self, request: Request, seconds: float, memory: int, most: int
    ) -> tuple[bytes, bytes]:
        """(JSON of the answer, its bytes)."""
        for handle in request.dropped:
            self._kept.pop(handle, None)
        function = self._function(request.function)
        self._confinement.begin(seconds, memory)
        try:
            head, data = self._evaluate(function, request)
            if len(head) + len(data) > most:
                head, data = _overrun("answer"), b""
        except MemoryError:
            head, data = _overrun("memory"), b""
        finally:
            self._confinement.end()
        if request.rebase:
            self._confinement.rebase()
        return head, data

    def _evaluate(self, function: Callable[..., Any], request: Request) -> tuple[bytes, bytes]:
        try:
            if request.makes:
                self._kept[request.handle], value = function(*request.arguments)
            elif request.handle is not None:
                value = function(self._kept[request.handle], *request.arguments)
            else:
                value = function(*request.arguments)
            data = b""
            if isinstance(value, WithBytes):
                value, data = value
            return json.dumps({"value": value}, allow_nan=False).encode(), data
        except MemoryError:
            raise
        except BaseException as error:  # panics of Rust are no Exception
            message = str(error)[:_LONGEST_MESSAGE]
            return json.dumps({"raised": [type(error).__name__, message]}).encode(), b""

    def _function(self, name: str) -> Callable[..., Any]:
        if name not in self._functions:
            module, _, attribute = name.partition(".")
            imported = import_module(f"qlora_builders.confined.{module}")
            self._functions[name] = getattr(imported, attribute)
            self._confinement.rebase()
        return self._functions[name]


def _overrun(what: str) -> bytes:
    return json.dumps({"overrun": what}).encode()


def _requests(descriptor: int) -> Iterator[tuple[Request, float, int, int]]:
    while len(head := _read(descriptor, HEAD.size)) == HEAD.size:
        length, *limits = HEAD.unpack(head)
        payload = _read(descriptor, length)
        if len(payload) < length:
            return
        yield Request(*pickle.loads(payload)), *limits


def _read(descriptor: int, size: int) -> bytes:
    """Fewer bytes at the end of the file."""
    parts = []
    while size and (part := os.read(descriptor, min(size, CHUNK))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def main() -> None:
    answers = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whatever prints does not answer
    worker = _Worker()
    if len(sys.argv) > 1:
        end_with(int(sys.argv[1]))
    for request in _requests(0):
        head, data = worker.answer(*request)
        left = memoryview(LENGTHS.pack(len(head), len(data)) + head + data)
        try:
            while left:
                left = left[os.write(answers, left) :]
        except BrokenPipeError:
            return


if __name__ == "__main__":
    main()
