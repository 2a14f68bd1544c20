"""What an optimizer trains and how fast: parameters, their groups, the learning rate over a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlora_builders.console import Gather, alone
from qlora_builders.errors import ConfigError, PlanError, TrainingError
from qlora_builders.modules import LoRALinear
from qlora_builders.tensor.sharded import local_part


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Raises PlanError if nothing trains."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise PlanError(
            "the plan trains nothing; add a rule of kind 'lora' or 'qlora', a rule "
            "{match: ..., kind: linear, trainable: true}, or name modules in `train`"
        )
    return parameters


def check_adapters_learned(model: nn.Module, *, gather: Gather = alone) -> None:
    """
    Raises:
        TrainingError: if every lora_B is still zero, or what PiSSA started it from, so that the run
            changed nothing.
    """
    learned = []
    for module in model.modules():
        if isinstance(module, LoRALinear):
            weight, start = local_part(module.lora_B.weight), module.lora_B_init
            learned.append(bool(weight.any() if start is None else (weight != start).any()))
    if learned and not any(gather(any(learned))):
        raise TrainingError(
            "all lora_B weights are what they were before training, so the adapter does nothing; "
            "check optimizer.lr and lr_schedule"
        )


def all_finite(parameters: Iterable[Tensor], *, gather: Gather = alone) -> bool:
    return all(gather(all(bool(torch.isfinite(local_part(p)).all()) for p in parameters)))


def lora_plus_groups(model: nn.Module, *, lr: float, ratio: float) -> list[dict[str, Any]]:
    """LoRA+ (https://arxiv.org/abs/2402.12354): every `lora_B` learns `ratio` times as fast.

    Args:
        lr: of everything else that trains; the first group.
        ratio: the authors' runs do best with 2 to 32, the more the harder the task.

    Raises:
        ConfigError: if no `lora_B` trains.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    fast = [p for name, p in trained if ".lora_B." in name]
    others = [p for name, p in trained if ".lora_B." not in name]
    if not fast:
        raise ConfigError(
            f"training.lora_plus_ratio={ratio} needs adapters to train; the plan has none"
        )
    return [{"params": others, "lr": lr}, {"params": fast, "lr": lr * ratio}]


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
        name: a key of `SHAPES`.
        total_steps: optimizer steps of the run.
        warmup_ratio: warm-up as a fraction of total_steps, unless `warmup_steps` is given.
        min_lr_ratio: factor that the shape falls to.
    """
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
