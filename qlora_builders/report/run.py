"""What a run directory says, however little of it is there: a run that goes on, one that stopped.

Nothing in it is trusted. Files are read as data only, config.yaml without its interpolations, and
what is not as expected is left out.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # a dependency of omegaconf

from qlora_builders.checkpoint.run_dir import CONFIG_FILE, RESULTS
from qlora_builders.config.resume import flatten
from qlora_builders.errors import ConfigError
from qlora_builders.outputs import step_folders
from qlora_builders.training.environment import ENVIRONMENT_FILE
from qlora_builders.training.progress import METRICS_FILE, read_rows
from qlora_builders.training.samples import SAMPLES_FILE

_LARGEST = 1e300  # beyond it a value is shown as not finite, so that no sum of values overflows
_MOST_CONFIG_BYTES = 2**20


@dataclass(frozen=True)
class Run:
    """One run directory, read once."""

    path: Path
    name: str
    metrics: Mapping[str, tuple[list[int], list[float]]]  # key -> steps, values; NaN where missing
    config: Mapping[str, Any]  # flat: {"training.seed": 0}
    processes: Sequence[Mapping[str, Any]]  # environment.jsonl: one entry per process of the run
    samples: Sequence[Mapping[str, Any]]  # samples.jsonl
    is_going: bool  # a process has it open
    result: Path | None  # adapter/ or model/
    notes: Sequence[str] = field(default=())  # what could not be read

    @property
    def last_step(self) -> int:
        return max((steps[-1] for steps, _ in self.metrics.values() if steps), default=0)

    @property
    def total_steps(self) -> int | None:
        total = self.processes[-1].get("total_steps") if self.processes else None
        return total if isinstance(total, int) else None

    @property
    def is_finished(self) -> bool:
        done = self.last_step >= (self.total_steps or 0)
        return self.result is not None and done and not self.is_going

    @property
    def status(self) -> str:
        of = f" of {self.total_steps:,}" if self.total_steps else ""
        at = f"step {self.last_step:,}{of}"
        if self.is_going:
            return f"running, {at}"
        if self.is_finished:
            return f"finished, {at}"
        return f"stopped after {at}" if self.last_step else "stopped before the first step"

    @property
    def compares_pairs(self) -> bool:
        """Whether it is a run of `dpo`, whose loss is one of pairs of answers."""
        return "dpo.beta" in self.config

    def resumed_at(self) -> list[int]:
        steps = [process.get("first_step") for process in self.processes]
        return [step for step in steps if isinstance(step, int) and step > 0]

    @property
    def skipped_rows(self) -> list[str]:
        """A line for each file with rows that the run left out."""
        lines = self.processes[-1].get("skipped_rows") if self.processes else None
        return [line for line in lines if isinstance(line, str)] if isinstance(lines, list) else []

    def adapter(self) -> Path | None:
        """The newest folder with an adapter: the result, or that of the last checkpoint."""
        folders = [self.path / "adapter", *reversed(step_folders(self.path))]
        return next((f for f in folders if (f / "adapter_config.json").is_file()), None)

    def base(self) -> Path | None:
        """The base checkpoint, if it is still where the run found it."""
        folder = self.config.get("checkpoint.dir")
        if not isinstance(folder, str):
            return None
        started_in = self.processes[-1].get("directory") if self.processes else None
        path = Path(started_in if isinstance(started_in, str) else "", folder)
        return path if path.is_dir() else None


def find_runs(path: str | Path) -> list[Path]:
    """A run directory, or the runs in a folder of them, such as a sweep's."""
    path = Path(path)
    if _is_run(path) or not path.is_dir():
        return [path]
    return sorted(folder for folder in path.iterdir() if _is_run(folder)) or [path]


def _is_run(path: Path) -> bool:
    return any(_is_file(path / name) for name in (METRICS_FILE, CONFIG_FILE))


def read_run(path: str | Path, *, is_going: bool | None = None) -> Run:
    """
    Args:
        is_going: whether a process is training it; None: see whether one holds its lock.

    Raises:
        ConfigError: if it is no run directory.
    """
    path = Path(path)
    if not _is_run(path):
        raise ConfigError(
            f"{str(path)!r} is no run directory: it has neither {METRICS_FILE} nor {CONFIG_FILE}; "
            "give the output_dir of a finetune or dpo"
        )
    notes: list[str] = []
    results = [path / name for name in RESULTS if (path / name).is_dir()]
    return Run(
        path=path,
        name=path.resolve().name,
        metrics=_series(_rows(path / METRICS_FILE)),
        config=_read_config(path / CONFIG_FILE, notes),
        processes=_rows(path / ENVIRONMENT_FILE),
        samples=_rows(path / SAMPLES_FILE),
        is_going=_is_locked(path) if is_going is None else is_going,
        result=results[0] if results else None,
        notes=notes,
    )


def _rows(file: Path) -> list[dict[str, Any]]:
    rows = read_rows(file) if _is_file(file) else []
    return [row for row in rows if isinstance(row, dict)]


def _series(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """Every key with numbers, over the steps in order; of a step that is there twice, the last."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        step = row.get("step")
        if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 10**15:
            continue
        for key, value in row.items():
            if key != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                finite = -_LARGEST < value < _LARGEST  # false for NaN, and exact for any integer
                found.setdefault(key, {})[step] = float(value) if finite else math.nan
    return {
        key: (sorted(values), [values[step] for step in sorted(values)])
        for key, values in found.items()
    }


class _PlainLoader(yaml.SafeLoader):
    """No aliases: a few lines of them can stand for more text than fits into memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases, which a run's config never has")
        return super().compose_node(parent, index)


def _read_config(file: Path, notes: list[str]) -> dict[str, Any]:
    if not _is_file(file):
        return {}
    try:
        if file.stat().st_size > _MOST_CONFIG_BYTES:
            raise ValueError(f"larger than {_MOST_CONFIG_BYTES // 2**20} MiB")
        tree = yaml.load(file.read_text("utf-8"), _PlainLoader)
        return flatten(tree) if isinstance(tree, dict) else {}
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        notes.append(f"{file.name} cannot be read: {' '.join(str(error).split())}")
        return {}


def _is_file(path: Path) -> bool:
    """A regular file that may be read; a pipe would wait forever."""
    return path.is_file() and os.access(path, os.R_OK)


def _is_locked(path: Path) -> bool:
    """Whether `run_directory` of another process holds it."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)
    return False


def spell_value(value: Any) -> str:
    """A config value as its YAML would have it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)
