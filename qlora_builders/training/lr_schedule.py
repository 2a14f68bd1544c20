"""The learning rate over a run: linear warm-up, then cosine, linear or constant."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from qlora_builders.errors import ConfigError, did_you_mean

SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "linear": lambda progress: 1 - progress,
    "constant": lambda _: 1.0,
}


def lr_factor(
    name: str,
    *,
    total_steps: int,
    warmup_ratio: float = 0.0,
    warmup_steps: int | None = None,
    min_lr_ratio: float = 0.0,
) -> Callable[[int], float]:
    """Steps done -> factor of the peak learning rate, as `torch.optim.lr_scheduler.LambdaLR` wants.

    Warm-up reaches the peak at its last step, so no step runs at zero; the last step of the run
    is one before the shape's end, so it still learns something.

    Args:
        name: "cosine", "linear" or "constant".
        total_steps: optimizer steps of the run.
        warmup_ratio: warm-up as a fraction of total_steps, unless `warmup_steps` is given.
        min_lr_ratio: factor that the shape falls to.

    Raises:
        ConfigError: for an unknown name.
    """
    if name not in SHAPES:
        raise ConfigError(f"lr_schedule.name is {name!r}{did_you_mean(name, SHAPES)}")
    shape = SHAPES[name]
    warmup = math.ceil(warmup_ratio * total_steps) if warmup_steps is None else warmup_steps

    def factor(steps_done: int) -> float:
        if steps_done < warmup:
            return (steps_done + 1) / warmup
        progress = (steps_done - warmup) / max(1, total_steps - warmup)
        return min_lr_ratio + (1 - min_lr_ratio) * shape(min(progress, 1.0))

    return factor


def check_same_past(
    schedule: Mapping[str, Any], *, total_steps: int, before: int, steps_done: int
) -> None:
    """Check that a run of `before` steps may go on as one of `total_steps`.

    Args:
        schedule: the other arguments of `lr_factor`.

    Raises:
        ConfigError: if steps already done would have had another learning rate, or are too many.
    """
    if steps_done > total_steps:
        raise ConfigError(
            f"cannot resume: {steps_done} steps are done, but the run has only {total_steps}; "
            "raise training.max_steps or epochs"
        )
    now, then = (lr_factor(total_steps=steps, **schedule) for steps in (total_steps, before))
    for step in range(steps_done):
        if now(step) != then(step):
            raise ConfigError(
                f"cannot resume after step {steps_done}: a run of {total_steps} steps has another "
                f"learning rate at step {step + 1} than the run of {before} steps that made the "
                "checkpoint; keep training.max_steps and epochs (only a constant lr_schedule lets "
                "them change, once warm-up is over or with warmup_steps)"
            )
