"""What a run directory says, however little of it is there: a run that goes on, one that stopped;
what it came to, and what each layer's adapter has learned.

Nothing in it is trusted. Files are read as data only, config.yaml without its interpolations, and
what is not as expected is left out.
"""

from __future__ import annotations

import fcntl
import math
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]  # a dependency of omegaconf

from qlora_builders.checkpoint import adapter_plan, read_adapter, read_arch
from qlora_builders.checkpoint.merge_report import WeightFigures, weight_figures
from qlora_builders.checkpoint.peft.read import AdapterInfo
from qlora_builders.checkpoint.peft.write import PREFIX
from qlora_builders.config.checks import flatten
from qlora_builders.errors import ConfigError, QLoRAError
from qlora_builders.files.outputs import (
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    METRICS_FILE,
    RESULTS,
    SAMPLES_FILE,
    step_folders,
)
from qlora_builders.models import llama, slot_name
from qlora_builders.training.loggers import read_rows

AVERAGED = 10  # values of the final loss: those of the last steps that were logged
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
    notes: Sequence[str] = ()  # what could not be read

    @property
    def last_step(self) -> int:
        return max((steps[-1] for steps, _ in self.metrics.values() if steps), default=0)

    @property
    def last_process(self) -> Mapping[str, Any]:
        return self.processes[-1] if self.processes else {}

    @property
    def total_steps(self) -> int:
        """0 if it is not known."""
        total = self.last_process.get("total_steps")
        return total if isinstance(total, int) else 0

    @property
    def is_finished(self) -> bool:
        return bool(self.result) and self.last_step >= self.total_steps and not self.is_going

    @property
    def status(self) -> str:
        of = f" of {self.total_steps:,}" if self.total_steps else ""
        how = "running," if self.is_going else "finished," if self.is_finished else "stopped after"
        if how == "stopped after" and not self.last_step:
            return "stopped before the first step"
        return f"{how} step {self.last_step:,}{of}"

    @property
    def compares_pairs(self) -> bool:
        """Whether its loss is one of pairs of answers: rewards are logged beside it."""
        return any("rewards/margins" in key for key in self.metrics)

    def resumed_at(self) -> list[int]:
        steps = [process.get("first_step") for process in self.processes]
        return [step for step in steps if isinstance(step, int) and step > 0]

    @property
    def skipped_rows(self) -> list[str]:
        """A line for each file with rows that the run left out."""
        lines = self.last_process.get("skipped_rows")
        return [line for line in lines if isinstance(line, str)] if isinstance(lines, list) else []

    def adapter(self) -> Path | None:
        """The newest folder with an adapter: the result, or that of the last checkpoint."""
        folders = [self.path / "adapter", *reversed(step_folders(self.path))]
        return next((f for f in folders if (f / "adapter_config.json").is_file()), None)

    def base(self) -> Path | None:
        """The base checkpoint, if it is still where the run found it."""
        folder, started_in = self.config.get("checkpoint.dir"), self.last_process.get("directory")
        if not isinstance(folder, str):
            return None
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
    return Run(
        path=path,
        name=path.resolve().name,
        metrics=_series(_rows(path / METRICS_FILE)),
        config=_read_config(path / CONFIG_FILE, notes),
        processes=_rows(path / ENVIRONMENT_FILE),
        samples=_rows(path / SAMPLES_FILE),
        is_going=_is_locked(path) if is_going is None else is_going,
        result=next((path / name for name in RESULTS if (path / name).is_dir()), None),
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
        if type(step) is int and 0 <= step < 10**15:
            for key, value in row.items():
                if key != "step" and type(value) in (int, float):
                    finite = -_LARGEST < value < _LARGEST  # false for NaN, exact for any integer
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
    try:
        if not _is_file(file):
            return {}
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


# ---- what the run came to --------------------------------------------------------------------


def final_figures(run: Run) -> dict[str, float]:
    """For the page of a run and the table of a sweep; without those of which no value is finite.

    `loss` is the mean of the last AVERAGED, `eval_loss` the last one, `best_eval_loss` the lowest,
    at `best_eval_step`; `tokens_per_s` and `step_s` are medians, `peak_memory_mib` the highest, and
    `exact_match` the share of right answers among the last samples.
    """

    def finite(key: str) -> list[tuple[int, float]]:
        steps, values = run.metrics.get(key, ([], []))
        return [(s, v) for s, v in zip(steps, values, strict=True) if math.isfinite(v)]

    def values(key: str) -> list[float]:
        return [value for _, value in finite(key)]

    found: dict[str, float] = {}
    if losses := values("loss"):
        found["loss"] = statistics.fmean(losses[-AVERAGED:])
    if evals := finite("eval_loss"):
        found["eval_loss"] = evals[-1][1]
        best = min(evals, key=lambda point: point[1])
        found["best_eval_step"], found["best_eval_loss"] = best
    for key in ("tokens_per_s", "step_s", "peak_memory_mib"):
        if all := values(key):
            found[key] = max(all) if key == "peak_memory_mib" else statistics.median(all)
    if rows := [row for row in run.samples if isinstance(row.get("step"), int)]:
        last = max(row["step"] for row in rows)
        found["exact_match"] = statistics.fmean(
            row.get("right") is True for row in rows if row["step"] == last
        )
    return found


# ---- what its layers have learned, and what quantization costs there -------------------------


@dataclass(frozen=True)
class LayerFigures:
    """By linear slot: `layers.0.self_attn.q_proj`."""

    updates: dict[str, float] = field(default_factory=dict)  # |scaling B A|, Frobenius norm
    weights: dict[str, WeightFigures] = field(default_factory=dict)  # of the base, if it is there
    notes: tuple[str, ...] = ()  # what could not be measured, and why


def layer_figures(run: Run) -> LayerFigures:
    """Read from the run's adapter and its base checkpoint, one tensor at a time; never raises for
    what is missing or damaged there."""
    folder, base = run.adapter(), run.base()
    if folder is None:
        return LayerFigures()
    what, updates = "adapter", {}
    try:
        info = read_adapter(folder)
        names = sorted(info.modules, key=_in_order)
        updates = {slot_name(name): update_norm(info, name) for name in names}
        if base is None:
            note = "the base checkpoint is not where the run found it, so weights are not compared"
            return LayerFigures(updates, notes=(note,))
        what = "base checkpoint"
        format = str(run.config.get("checkpoint.format", "auto"))
        arch = read_arch(base, format=format)
        components, train = adapter_plan(info)
        dtype = info.base.dtype if info.base else torch.bfloat16
        model = llama(arch, components, train=train, device="meta", dtype=dtype)
        return LayerFigures(updates, dict(weight_figures(model, base, format=format)))
    except (QLoRAError, OSError) as error:
        return LayerFigures(updates, notes=(f"the {what} cannot be read: {error}",))


def update_norm(info: AdapterInfo, name: str) -> float:
    """|scaling B A| of a module, without the product: |B A|^2 = trace((B^T B) (A A^T)), rank by
    rank."""
    a = info.tensors[f"{PREFIX}{name}.lora_A.weight"].load().double()  # [rank, in]
    b = info.tensors[f"{PREFIX}{name}.lora_B.weight"].load().double()  # [out, rank]
    square = torch.sum((b.T @ b) * (a @ a.T)).clamp(min=0)  # symmetric, so no transpose
    return info.modules[name].scaling * square.sqrt().item()


def _in_order(name: str) -> list[int | str]:
    """`layers.10` after `layers.9`."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
