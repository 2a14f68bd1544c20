"""What must not come out of a case is reported, with its seed."""

from __future__ import annotations

import ctypes
import random
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz_run
import pytest
import torch
from fuzz_run import Outcomes, run_cases
from kinds import Kind

from qlora_builders.errors import DataError

pytestmark = pytest.mark.fuzz

SOUND, BAD = b"sound", b"bad"


def run(tmp_path: Path, wrong: Callable[[], Any], **options: Any) -> Outcomes:
    """Four cases, of which the second does what is wrong."""
    folder = tmp_path / "good" / "folder"
    folder.mkdir(parents=True)
    (folder / "file").write_bytes(SOUND)

    def read(path: Path) -> dict[str, Any]:
        return {"value": 1 if (path / "file").read_bytes() == SOUND else wrong()}

    def change(data: bytes, rng: random.Random) -> bytes:
        return BAD if rng.random() < 0.5 else data

    seeds = [seed for seed in range(40) if _changes(seed)][:1]
    kept = [seed for seed in range(40) if not _changes(seed)][:3]
    kind = Kind("folder", "file", (change,), read, **options)
    found = run_cases(
        "made up", kind, [*kept[:1], *seeds, *kept[1:]], tmp_path / "good", tmp_path / "s"
    )
    assert found.counts["equal"] == 3  # those after it are run too
    return found


def _changes(seed: int) -> bool:
    rng = random.Random(f"made up {seed}")
    rng.choice((0,))
    return rng.random() < 0.5


def _sleep_without_python() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    ctypes.CDLL(None).sleep(60)


def _raise(error: BaseException) -> None:
    raise error


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "a bare exception": (lambda: {}["x"], "KeyError: 'x'"),
    "another value": (lambda: 2, "reads as something else:\nvalue: 1 -> 2"),
    "a warning": (lambda: warnings.warn("odd", stacklevel=1), "UserWarning: odd"),
    "an exit": (lambda: _raise(SystemExit(0)), "SystemExit: 0"),
    "an error that names nothing": (lambda: _raise(DataError("no")), "the file is not named: no"),
    "a hang": (lambda: time.sleep(60), "Hang: it takes longer than 1 s"),
    "a hang in C": (_sleep_without_python, "Timeout (0:00:02)!"),
    "a crash": (lambda: ctypes.string_at(0), "the process ended by signal 11"),
    "too much memory": (lambda: bytearray(2**30), "MemoryError"),
    "too large a tensor": (lambda: torch.zeros(2**20).sum().item(), "a tensor of 4,194,304 bytes"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_reported_with_its_seed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz_run, "SECONDS", 1)
    wrong, message = WRONG[name]
    found = run(tmp_path, wrong, bounded="tensor" in name)
    (text,) = found.failures.values()
    (seed,) = found.failures
    assert _changes(seed)
    assert message in text


def test_typed_errors_and_what_a_rule_explains_are_no_failures(tmp_path: Path) -> None:
    found = run(tmp_path / "a", lambda: _raise(DataError("file: no")))
    assert (found.counts["typed"], found.failures) == (1, {})
    found = run(tmp_path / "b", lambda: 2, rules=(lambda case: "two" if case.got else None,))
    assert (found.counts["two"], found.failures) == (1, {})
    found = run(tmp_path / "c", lambda: 2, rules=(lambda case: _raise(KeyError()),))
    assert found.counts["unexplained"] == 1
