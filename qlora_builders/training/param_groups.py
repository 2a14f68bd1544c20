"""Parameters of an optimizer in groups with learning rates of their own."""

from __future__ import annotations

from typing import Any

from torch import nn

from qlora_builders.errors import ConfigError


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
    if not fast:
        raise ConfigError(
            f"training.lora_plus_ratio={ratio} needs adapters to train; the plan has none"
        )
    others = [p for name, p in trained if ".lora_B." not in name]
    return [{"params": others, "lr": lr}, {"params": fast, "lr": lr * ratio}]
