"""`ask` a second process to evaluate what strangers wrote, within limits.

There is one such process for each process that asks, started when it is first needed as a fresh
interpreter: a fork of this one would have the locks of torch's threads without the threads. It ends
with this process. One that ran into a limit is not used again.

A request is `HEAD` and a pickle; it is from the parent and so trusted. An answer is two lengths,
JSON, and bytes for arrays of numbers; it is never unpickled.
"""

from __future__ import annotations

import itertools
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qlora_builders.errors import QLoRAError
from qlora_builders.files.reading import parse_json

_MB = 10**6
_ROOT = str(Path(__file__).resolve().parents[2])
_MOST_THREADS = 16  # of the Rust tokenizer: each has a stack, which counts as memory


class OverrunError(QLoRAError):
    """A limit was met. The message follows a subject: "takes more than 3 s of CPU time"."""


class RaisedError(QLoRAError):
    """The function raised; `kind` is the name of the exception's class."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message or kind)
        self.kind = kind


@dataclass(frozen=True)
class Limits:
    """Of one request: seconds of CPU time, bytes of memory, bytes of the answer."""

    seconds: float = 3.0
    memory: int = 320 * _MB
    answer: int = 32 * _MB

    def grown(self, size: int) -> Limits:
        """For so many bytes of the user's own, or of a file: far more than they take."""
        return Limits(
            self.seconds + size * 10e-6, self.memory + size * 200, self.answer + size * 16
        )


class Answer(NamedTuple):
    """What JSON has of a function's value, and its bytes."""

    value: Any
    data: bytes


def ask(function: str, *arguments: Any, limits: Limits) -> Answer:
    """`function(*arguments)` in the other process; `limits` grow with the arguments.

    Args:
        function: `module.name` in this package.

    Raises:
        RaisedError: if the function raises.
        OverrunError: if it meets a limit, or ends the process.
        QLoRAError: if the process cannot be started.
    """
    with _state.lock:
        return _running().ask(Request(function, arguments), limits)


class Kept:
    """Something that the other process makes once and keeps, such as a compiled template.

    It is made again in a process that replaces one that was ended. `info` is what `maker` answered.

    Raises:
        RaisedError, OverrunError, QLoRAError: as `ask` does.
    """

    def __init__(self, maker: str, *arguments: Any, limits: Limits, rebase: bool = False) -> None:
        self._handle = next(_handles)
        self._maker = Request(maker, arguments, self._handle, makes=True, rebase=rebase)
        self._limits = limits
        weakref.finalize(self, _dropped.append, self._handle).atexit = False
        with _state.lock:
            self._worker = _running()
            self.info: Any = self._worker.ask(self._maker, limits).value

    def ask(self, function: str, *arguments: Any, limits: Limits) -> Answer:
        """`function(self, *arguments)` there."""
        with _state.lock:
            worker = _running()
            if self._worker is not worker:
                worker.ask(self._maker, self._limits)
                self._worker = worker
            return worker.ask(Request(function, arguments, self._handle), limits)


class _Worker:
    """The other process."""

    def __init__(self) -> None:
        paths = dict.fromkeys([_ROOT, *(os.path.abspath(path) for path in sys.path if path)])
        environment = {
            "RAYON_NUM_THREADS": str(min(os.cpu_count() or 1, _MOST_THREADS)),
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "MALLOC_ARENA_MAX": "2",  # each reserves address space
        }
        command = [sys.executable, "-P", "-W", "ignore", "-m", "qlora_builders.confined.worker"]
        lifeline, self._lifeline = os.pipe()  # `worker.end_with`
        try:
            self._process = subprocess.Popen(
                [*command, str(lifeline)],
                pass_fds=[lifeline],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # where Rust tells its panics
                env=environment,
                start_new_session=True,  # Ctrl-C is for the parent
            )
        except OSError as error:
            os.close(self._lifeline)
            raise QLoRAError(f"cannot start a second process of {command[0]}: {error}") from error
        finally:
            os.close(lifeline)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests = self._process.stdin.fileno()
        self._answers = self._process.stdout.fileno()
        self._poll = select.poll()
        self._poll.register(self._answers, select.POLLIN)
        self.stop = weakref.finalize(self, _stop, self._process, self._lifeline)

    @property
    def alive(self) -> bool:
        return self.stop.alive and self._process.poll() is None

    def forget(self) -> None:
        """Leave it to the process that this one is a fork of."""
        self.stop.detach()
        self._process.returncode = 0
        _close(self._process, self._lifeline)

    def ask(self, request: Request, limits: Limits) -> Answer:
        """Of the module's `ask`."""
        dropped, _dropped[:] = tuple(_dropped), []
        try:
            payload = pickle.dumps(tuple(request._replace(dropped=dropped)), 5)
        except RecursionError:
            raise RaisedError("RecursionError", "nested too deeply") from None
        limits = limits.grown(len(payload))
        usable = False
        try:
            self._send(
                HEAD.pack(len(payload), limits.seconds, limits.memory, limits.answer) + payload
            )
            head, data = self._receive(limits)
            usable = "overrun" not in head
        except (EOFError, BrokenPipeError):
            raise self._ended(limits) from None
        finally:
            if not usable:  # after Ctrl-C too: the answer would be taken for that of the next
                self.stop()
        if "overrun" in head:
            raise OverrunError(_too_much(head["overrun"], limits))
        if "raised" in head:
            raise RaisedError(*head["raised"])
        return Answer(head["value"], data)

    def _send(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[os.write(self._requests, left) :]

    def _receive(self, limits: Limits) -> tuple[dict[str, Any], bytes]:
        # CPU time is what is limited; this is for a machine that gives none
        deadline = time.monotonic() + 60 + 20 * limits.seconds
        received = b""
        while len(received) < LENGTHS.size:
            received += self._read(deadline)
        length, extra = LENGTHS.unpack_from(received)
        if length + extra > limits.answer + 2**16:  # of an error
            raise OverrunError(_too_much("answer", limits))
        parts = [received[LENGTHS.size :]]
        missing = length + extra - len(parts[0])
        while missing > 0:
            parts.append(self._read(deadline))
            missing -= len(parts[-1])
        whole = b"".join(parts)
        return parse_json(whole[:length]), whole[length:]

    def _read(self, deadline: float) -> bytes:
        """What has come, which is a whole answer where that is short."""
        if not self._poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise OverrunError("is not done after a minute and more, most of it waiting")
        part = os.read(self._answers, CHUNK)
        if not part:
            raise EOFError
        return part

    def _ended(self, limits: Limits) -> QLoRAError:
        code = self._process.wait()
        if code >= 0:
            return QLoRAError(
                f"the process that reads files of strangers ended with exit code {code}; "
                f"'{sys.executable} -m qlora_builders.confined.worker' may say why"
            )
        kinds = {signal.SIGPROF: "time", signal.SIGABRT: "memory"}  # as Rust ends without memory
        if -code in kinds:
            return OverrunError(_too_much(kinds[signal.Signals(-code)], limits))
        return OverrunError(f"ends the process that evaluates it ({signal.strsignal(-code)})")


def _too_much(kind: str, limits: Limits) -> str:
    if kind == "time":
        return f"takes more than {limits.seconds:.3g} s of CPU time"
    if kind == "memory":
        return f"takes more than {limits.memory / _MB:,.0f} MB of memory"
    return f"makes more than {limits.answer / _MB:,.0f} MB of output"


class _State:
    """Of this process; a fork of it has its own."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.worker: _Worker | None = None


_handles = itertools.count(1)
_dropped: list[int] = []
_state = _State()


def _running() -> _Worker:
    if _state.worker is None or not _state.worker.alive:
        if _state.worker is not None:
            _state.worker.stop()
        _state.worker = None
        _state.worker = _Worker()
    return _state.worker


def _stop(process: subprocess.Popen[bytes], lifeline: int) -> None:
    """It has nothing to save."""
    process.kill()
    process.wait()
    _close(process, lifeline)


def _close(process: subprocess.Popen[bytes], lifeline: int) -> None:
    os.close(lifeline)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _after_fork() -> None:
    """The parent goes on with its worker, which ends when nobody holds its pipes any more."""
    if _state.worker is not None:
        _state.worker.forget()
    _state.lock, _state.worker = threading.RLock(), None


os.register_at_fork(after_in_child=_after_fork)


HEAD = struct.Struct("<QdQQ")  # length; limits: seconds, bytes of memory, bytes of the answer
LENGTHS = struct.Struct("<QQ")
CHUNK = 2**20  # bytes per read


class WithBytes(NamedTuple):
    """What a function returns whose answer has more than JSON."""

    value: Any
    data: bytes


class Request(NamedTuple):
    """`function` is `module.name` of this package.

    Its first argument is the object kept as `handle`, if there is one, unless it `makes` that: then
    it returns the object to keep and the value to answer. `dropped` are handles that nobody has any
    more. `rebase`: what the function leaves in memory does not count against later requests.
    """

    function: str
    arguments: tuple[Any, ...]
    handle: int | None = None
    makes: bool = False
    rebase: bool = False
    dropped: tuple[int, ...] = ()


# ---- a conversation as text, as both processes name it ----------------------------------------

Message = Mapping[str, Any]
Span = tuple[int, int]  # characters [start, end)


@dataclass(frozen=True)
class RenderedChat:
    """
    `spans` are the assistant's characters, end-of-turn tokens included. `needs_eos` is set when
    the text ends with an assistant turn that the template does not close: the caller appends EOS.
    """

    text: str
    spans: list[Span]
    needs_eos: bool
