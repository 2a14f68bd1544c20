"""The learning rate over a run: linear warm-up, then cosine, linear or constant."""

from __future__ import annotations

import math
from collections.abc import Callable

from qlora_builders.errors import ConfigError, did_you_mean

_SHAPES: dict[str, Callable[[float], float]] = {
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
    if name not in _SHAPES:
        raise ConfigError(f"lr_schedule.name is {name!r}{did_you_mean(name, _SHAPES)}")
    shape = _SHAPES[name]
    warmup = math.ceil(warmup_ratio * total_steps) if warmup_steps is None else warmup_steps

    def factor(steps_done: int) -> float:
        if steps_done < warmup:
            return (steps_done + 1) / warmup
        progress = (steps_done - warmup) / max(1, total_steps - warmup)
        return min_lr_ratio + (1 - min_lr_ratio) * shape(min(progress, 1.0))

    return factor
