"""Gated feed-forward layer (https://arxiv.org/abs/2002.05202)."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


# Hugging Face's names for `hidden_act`
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": F.relu,
}


class FeedForward(nn.Module):
    """down_proj(activation(gate_proj(x)) * up_proj(x)), [..., hidden] -> [..., hidden].

    Args:
        gate_proj: [..., hidden] -> [..., intermediate].
        up_proj: as gate_proj.
        down_proj: [..., intermediate] -> [..., hidden].
        activation: elementwise; one of `ACTIVATIONS` in a Llama.
    """

    def __init__(
        self,
        *,
        gate_proj: nn.Module,
        up_proj: nn.Module,
        down_proj: nn.Module,
        activation: Callable[[Tensor], Tensor] = F.silu,
    ) -> None:
        super().__init__()
        self.gate_proj = gate_proj
        self.up_proj = up_proj
        self.down_proj = down_proj
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
