"""The limits of the process that calls this, set anew for each request.

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
import os
import resource
import signal
from pathlib import Path

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
