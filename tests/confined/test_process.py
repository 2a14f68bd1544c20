"""The second process: it ends with the first, is started once, and what it says is bounded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from qlora_builders.confined import process
from qlora_builders.confined.process import Kept, Limits, OverrunError, RaisedError, ask
from qlora_builders.errors import QLoRAError

LIMITS = Limits(0.3, 96_000_000, 1_000_000)


def worker_pid() -> int:
    assert process._state.worker is not None
    return process._state.worker._process.pid


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")  # nobody reaps the orphans of some containers
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


def matches(pattern: str, *names: str) -> list[str | None]:
    return ask("patterns.matches", [pattern], list(names), True, limits=LIMITS).value[0]


def test_it_is_started_once_and_again_when_it_was_killed() -> None:
    assert matches("a+", "aa", "b") == ["", None]
    first = worker_pid()
    assert matches("b", "b") == [""]
    assert worker_pid() == first
    os.kill(first, signal.SIGKILL)
    time.sleep(0.1)
    assert matches("b", "b") == [""]
    assert worker_pid() != first
    assert not is_running(first)


def test_what_raises_says_what_and_ends_nothing() -> None:
    matches("a", "a")
    pid = worker_pid()
    with pytest.raises(RaisedError, match="unterminated") as caught:
        matches("(", "a")
    assert caught.value.kind in ("error", "PatternError")
    assert worker_pid() == pid


@pytest.mark.parametrize(
    ("pattern", "name", "what"),
    [
        ("(a|a)+b", "a" * 40, r"takes more than 0\.3\d* s of CPU time"),
        ("a*" * 40 + "b", "a" * 400, "takes more than .* s of CPU time"),
        ("(a{1,9999}){1,9999}b", "a" * 9999, "takes more than"),
    ],
)
def test_limits(pattern: str, name: str, what: str) -> None:
    with pytest.raises(OverrunError, match=f"^{what}"):
        matches(pattern, name)
    assert matches("a", "a") == [""]


def test_an_answer_of_any_size_is_not_read() -> None:
    with pytest.raises(OverrunError, match="makes more than 1 MB of output"):
        ask("patterns.matches", ["a"] * 999, ["a"] * 999, True, limits=replace(LIMITS, seconds=9))


def test_arguments_nested_too_deeply() -> None:
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(RaisedError, match="nested too deeply"):
        ask("patterns.problems", nested, limits=LIMITS)
    while nested:  # or freeing it would recurse
        nested = nested.pop()  # type: ignore[assignment]


def test_kept_objects_come_back_in_a_new_process() -> None:
    made = Kept("chat.compiled", "{{ messages }}", {}, "x", datetime.now(), limits=Limits())
    matches("a", "a")
    os.kill(worker_pid(), signal.SIGKILL)
    time.sleep(0.1)
    assert made.ask("chat.render", [{"a": 1}], limits=Limits()).value == "[{'a': 1}]"


def test_an_interpreter_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process._state, "worker", None)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(QLoRAError, match="cannot start a second process of /nowhere/python: "):
        matches("a", "a")


def test_an_interpreter_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process._state, "worker", None)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(QLoRAError, match="ended with exit code 1; '/bin/false -m qlora_builders"):
        matches("a", "a")


START = """
    import os, sys, time
    from qlora_builders.confined import process
    process.ask("patterns.problems", ["a"], limits=process.Limits())
    print(process._state.worker._process.pid, flush=True)
"""
ENDINGS = {
    "end": "",
    "error": "raise SystemError",
    "exit": "os._exit(3)",
    "kill": "os.kill(os.getpid(), 9)",
    "interrupt": "os.kill(os.getpid(), 2); time.sleep(9)",
    "fork": (
        "pid = os.fork()\n"
        "if not pid:\n"
        "    process.ask('patterns.problems', ['a'], limits=process.Limits())\n"
        "    print(process._state.worker._process.pid, flush=True)\n"
        "    sys.exit()\n"
        "os.waitpid(pid, 0)\n"
        "process.ask('patterns.problems', ['a'], limits=process.Limits())"
    ),
    "kill while it works": (
        "import threading\n"
        "threading.Timer(0.5, os.kill, (os.getpid(), 9)).start()\n"
        "limits = process.Limits(9999)\n"
        "process.ask('patterns.matches', ['(a|a)+b'], ['a' * 50], True, limits=limits)"
    ),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_none_outlives_the_parent(ending: str) -> None:
    code = textwrap.dedent(START) + ENDINGS[ending]
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    pids = [int(line) for line in done.stdout.split()]
    assert len(pids) == (2 if ending == "fork" else 1), done.stderr
    assert "ResourceWarning" not in done.stderr
    deadline = time.monotonic() + 60
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_listing_and_help_start_none() -> None:
    code = """
        import sys
        from qlora_builders import cli
        from qlora_builders.confined import process
        for words in (["--help"], ["configs", "ls"], ["finetune", "--help"]):
            try:
                cli.main(words)
            except SystemExit:
                pass
        assert process._state.worker is None
        assert not {"jinja2", "tokenizers"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True)
