"""Cases of one kind, in a process of their own: a crash, a hang or a memory bomb names its case."""

from __future__ import annotations

import faulthandler
import json
import os
import random
import resource
import shutil
import signal
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
import torch._dynamo  # TorchDispatchMode needs it, and every process would import it anew
from explain import Case, differing
from kinds import Kind
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_builders.errors import PlanError, QLoRAError

SECONDS = 20  # no file here takes a tenth of a second
MEBIBYTES = 512  # that a case may take beside what the process has


@dataclass
class Outcomes:
    """What became of cases: `"typed"`, `"equal"` or the reason of a rule -> how many; failures."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: dict[int, str] = field(default_factory=dict)  # seed -> what is wrong


class Hang(BaseException):
    """Not an Exception, which readers of foreign files may catch."""


class Failure(Exception):
    """What may not come out of a case."""


def run_cases(name: str, kind: Kind, seeds: Sequence[int], good: Path, scratch: Path) -> Outcomes:
    """
    Args:
        good: the sound folders; they are copied to `scratch`, where files are changed.
    """
    outcomes, left = Outcomes(), list(seeds)
    scratch.mkdir(parents=True, exist_ok=True)
    while left:
        log, trace = scratch / "log", scratch / "trace"
        with warnings.catch_warnings(), trace.open("w") as traces:
            # of forking beside threads; the child uses none of those of its parent
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
            if pid == 0:
                _child(name, kind, left, good, scratch, log, traces)
        _, status = os.waitpid(pid, 0)
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        for seed, outcome, problem in (line for line in lines if len(line) == 3):
            outcomes.counts[outcome] += 1
            if problem:
                outcomes.failures[seed] = problem
        if status == 0:
            break
        seed = lines[-1][0] if lines else left[0]
        how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "a hang or an exit"
        outcomes.failures[seed] = f"the process ended by {how}:\n{trace.read_text()[:3000]}"
        left = left[left.index(seed) + 1 :]
    return outcomes


def _child(
    name: str,
    kind: Kind,
    seeds: Iterable[int],
    good: Path,
    scratch: Path,
    log: Path,
    traces: TextIO,
) -> None:
    code = 1
    try:
        faulthandler.enable(traces)
        for folder in good.iterdir():
            shutil.rmtree(scratch / folder.name, ignore_errors=True)
            shutil.copytree(folder, scratch / folder.name)
        os.chdir(scratch)
        _bound_memory(scratch)
        signal.signal(signal.SIGALRM, _timed_out)
        with log.open("w", buffering=1) as file:
            expected = kind.read(scratch / kind.folder)
            for seed in seeds:
                file.write(json.dumps([seed]) + "\n")
                # what hangs outside of Python is ended by the thread of faulthandler
                faulthandler.dump_traceback_later(2 * SECONDS, exit=True, file=traces)
                outcome, problem = _outcome(name, kind, seed, expected, scratch)
                file.write(json.dumps([seed, outcome, problem]) + "\n")
        code = 0
    except BaseException:
        traces.write(traceback.format_exc())
        traces.flush()
    finally:
        os._exit(code)


def _bound_memory(scratch: Path) -> None:
    with open("/proc/self/status") as file:
        used = next(int(line.split()[1]) for line in file if line.startswith("VmData"))
    most = used * 2**10 + MEBIBYTES * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        import datasets
    except ImportError:
        return
    datasets.config.HF_DATASETS_CACHE = scratch / "cache"


def _timed_out(*_: Any) -> None:
    raise Hang(f"it takes longer than {SECONDS} s")


def changed(name: str, kind: Kind, seed: int, before: bytes) -> bytes:
    rng = random.Random(f"{name} {seed}")
    return rng.choice(kind.change)(before, rng)


def _outcome(
    name: str, kind: Kind, seed: int, expected: dict[str, Any], scratch: Path
) -> tuple[str, str]:
    """What a case is, and what is wrong with that."""
    folder = scratch / kind.folder
    file = folder / kind.file
    before = file.read_bytes()
    after = changed(name, kind, seed, before)
    _replace(file, after)
    try:
        kind.finish(folder)
        signal.alarm(SECONDS)
        most = 2 * max(len(after), sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()))
        with _bounded(most if kind.bounded else None):
            got = kind.read(folder)
        signal.alarm(0)
        return _judge(
            kind, Case(folder, file, before, after, expected, got, differing(expected, got))
        )
    except QLoRAError as error:
        names = kind.names or (file.name, file.stem)
        text = str(error)
        if isinstance(error, PlanError) or any(word in text for word in names):
            return "typed", ""
        return "unnamed", f"the file is not named: {text[:500]}"
    except BaseException as error:
        frames = traceback.format_exception(error)
        return "failed", "".join(frames[-14:])[-2500:]
    finally:
        signal.alarm(0)
        _replace(file, before)
        kind.finish(folder)


def _replace(file: Path, content: bytes) -> None:
    """A new file of that name: the one before may be mapped into memory."""
    file.unlink()
    file.write_bytes(content)


def _judge(kind: Kind, case: Case) -> tuple[str, str]:
    if not case.differing:
        return "equal", ""
    for rule in kind.rules:
        try:
            reason = rule(case)
        except Exception:  # the other reader finds nothing to explain
            reason = None
        if reason is not None:
            return reason, ""
    shown = [
        f"{k}: {case.expected.get(k)!r:.200} -> {case.got.get(k)!r:.200}" for k in case.differing
    ]
    return "unexplained", "reads as something else:\n" + "\n".join(shown[:6])


# ---- memory -------------------------------------------------------------------------------------


class _Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation of this thread gives."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if type(tensor) is torch.Tensor and not tensor.is_meta and not tensor.is_sparse:
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return result


@contextmanager
def _bounded(most: int | None) -> Iterator[None]:
    """No tensor above that many bytes, those of reading threads included.

    Raises:
        Failure: if there was one, whatever else went wrong.
    """
    if most is None:
        yield
        return
    sizes, empty = [0], torch.empty

    def recorded(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("dtype") == torch.uint8 and isinstance(args[0], int):
            sizes.append(args[0])
        return empty(*args, **kwargs)

    torch.empty = recorded
    try:
        with _Largest() as largest:
            yield
    finally:
        torch.empty = empty
        if max(largest.nbytes, *sizes) > most:
            raise Failure(f"a tensor of {max(largest.nbytes, *sizes):,} bytes; at most {most:,}")
