"""A decoder layer, and what it has besides attention. [b, s, hidden] -> [b, s, hidden]"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_builders.modules.attention import KVCache, Mask
from qlora_builders.modules.checkpointing import run_checkpointed

Activation = Callable[[Tensor], Tensor]
# Hugging Face's names for `hidden_act`
ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class DecoderLayer(nn.Module):
    """x + self_attn(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        *,
        self_attn: nn.Module,
        mlp: nn.Module,
        input_layernorm: nn.Module,
        post_attention_layernorm: nn.Module,
    ) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.mlp = mlp
        self.input_layernorm = input_layernorm
        self.post_attention_layernorm = post_attention_layernorm

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Mask,
        cache: KVCache | None,
        checkpointing: str = "none",
    ) -> Tensor:
        return run_checkpointed(checkpointing, self._forward, x, cos, sin, mask, cache)

    def _forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask, cache: KVCache | None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask=mask, cache=cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (https://arxiv.org/abs/1910.07467), statistics in float32.

    The normalized value is rounded to the input's dtype before the weight multiplies, as
    transformers does it, so bfloat16 results agree bit for bit.
    """

    def __init__(
        self,
        dim: int,
        *,
        eps: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:  # [..., dim] -> [..., dim]
        wide = x.float()
        normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * normalized.to(x.dtype)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, eps={self.eps}"


class FeedForward(nn.Module):
    """down_proj(activation(gate_proj(x)) * up_proj(x)) (https://arxiv.org/abs/2002.05202).

    Args:
        gate_proj, up_proj: [..., hidden] -> [..., intermediate]; down_proj the reverse.
        activation: elementwise; one of `ACTIVATIONS` in a Llama.
    """

    def __init__(
        self,
        *,
        gate_proj: nn.Module,
        up_proj: nn.Module,
        down_proj: nn.Module,
        activation: Activation = F.silu,
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
    def forward(ctx: Any, activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
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
