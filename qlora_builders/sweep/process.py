"""One job of a sweep: a process of its own, so that its memory and its mistakes end with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from qlora_builders.console import StopRequest

_KEPT = 2**14  # bytes of stderr to find the error in


class JobRunner:
    """Runs one command after another; what comes as a signal goes to the one that is running.

    Attributes:
        stop: set by the first SIGINT or SIGTERM; no other command is to start then.
    """

    def __init__(self) -> None:
        self.stop = StopRequest()
        self._process: subprocess.Popen[bytes] | None = None

    @contextmanager
    def passing_on_signals(self) -> Iterator[None]:
        def pass_on(number: int, _frame: FrameType | None) -> None:
            self.stop.signal_number = self.stop.signal_number or number
            if self._process is not None:
                self._process.send_signal(number)

        numbers = (signal.SIGINT, signal.SIGTERM)
        previous = {number: signal.signal(number, pass_on) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def run(self, command: Sequence[str]) -> tuple[int, float, str]:
        """Run `qlora COMMAND`; returns its exit code, how long it took in seconds, and its error.

        All its output is passed on. Its session is one of its own: Ctrl-C in a terminal would
        otherwise reach it twice, and the second one ends a run without a checkpoint.
        """
        started = time.monotonic()
        words = [sys.executable, "-m", "qlora_builders.cli", *command]
        with subprocess.Popen(words, stderr=subprocess.PIPE, start_new_session=True) as process:
            self._process = process
            if self.stop.signal_number is not None:  # it came while there was no one to tell
                process.send_signal(self.stop.signal_number)
            assert process.stderr is not None
            tail = b""
            while chunk := os.read(process.stderr.fileno(), 2**16):
                sys.stderr.buffer.write(chunk)
                sys.stderr.flush()
                tail = (tail + chunk)[-_KEPT:]
            code = process.wait()
            self._process = None
        return code, time.monotonic() - started, error_in(tail.decode(errors="replace"), code)


def error_in(stderr: str, code: int) -> str:
    """What a job said of its end: its lines with `error:`, else the last one of a traceback."""
    if code in (0, 128 + signal.SIGINT):
        return ""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if errors:
        return "; ".join(errors)
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return lines[-1] if lines else f"exit code {code}"
