"""What a run came to, as numbers: for the page of a run, and for the table of a sweep."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from qlora_builders.report.run import Run

AVERAGED = 10  # values of the final loss: those of the last steps that were logged


@dataclass(frozen=True)
class Figures:
    """None where a run has no finite value."""

    loss: float | None  # mean of the last AVERAGED
    eval_loss: float | None  # the last one
    best_eval_loss: float | None
    best_eval_step: int | None
    tokens_per_s: float | None  # median over the steps
    step_s: float | None  # median over the steps
    peak_memory_mib: float | None
    exact_match: float | None  # share of right answers among the last samples


def final_figures(run: Run) -> Figures:
    def finite(key: str) -> list[tuple[int, float]]:
        steps, values = run.metrics.get(key, ([], []))
        return [(s, v) for s, v in zip(steps, values, strict=True) if math.isfinite(v)]

    def median(key: str) -> float | None:
        values = [value for _, value in finite(key)]
        return statistics.median(values) if values else None

    losses = [value for _, value in finite("loss")][-AVERAGED:]
    evals = finite("eval_loss")
    best = min(evals, key=lambda point: point[1], default=None)
    return Figures(
        loss=statistics.fmean(losses) if losses else None,
        eval_loss=evals[-1][1] if evals else None,
        best_eval_loss=best[1] if best else None,
        best_eval_step=best[0] if best else None,
        tokens_per_s=median("tokens_per_s"),
        step_s=median("step_s"),
        peak_memory_mib=max((value for _, value in finite("peak_memory_mib")), default=None),
        exact_match=_exact_match(run),
    )


def _exact_match(run: Run) -> float | None:
    rows = [row for row in run.samples if isinstance(row.get("step"), int)]
    last = max((row["step"] for row in rows), default=None)
    right = [row.get("right") is True for row in rows if row["step"] == last]
    return sum(right) / len(right) if right else None
