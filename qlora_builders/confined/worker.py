"""The process in which things are evaluated: `python -m qlora_builders.confined.worker`.

Requests come by stdin, answers go by stdout. The end of stdin is the end of the process, so that
none outlives its parent. The argument is the number of the pipe of `end_with`.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from qlora_builders.confined.limits import Confinement, end_with
from qlora_builders.confined.wire import CHUNK, HEAD, LENGTHS, Request, WithBytes

_LONGEST_MESSAGE = 4000  # characters of an error


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
