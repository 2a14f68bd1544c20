"""Gated feed-forward layer (https://arxiv.org/abs/2002.05202)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
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
        gate, up = self.gate_proj(x), self.up_proj(x)  # [..., intermediate]
        if torch.compiler.is_compiling():
            return self.down_proj(self.activation(gate) * up)
        return self.down_proj(_GatedProduct.apply(self.activation, gate, up))


class _GatedProduct(torch.autograd.Function):
    """activation(gate) * up, with the activation computed again in backward.

    Autograd would keep it as a third tensor of the intermediate size beside gate and up.
    """

    @staticmethod
    def forward(
        ctx: Any, activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor
    ) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(gate, up)
        return activation(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            activated = ctx.activation(leaf)
        grad_gate = grad_up = None
        if ctx.needs_input_grad[1]:
            (grad_gate,) = torch.autograd.grad(activated, leaf, grad * up)
        if ctx.needs_input_grad[2]:
            grad_up = activated.detach().mul_(grad)
        return None, grad_gate, grad_up
