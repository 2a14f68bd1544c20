"""`F.linear` with a frozen weight of another dtype than the input's, without a cast copy of it.

A bfloat16 `lm_head` of 128k x 2048 under float32 compute is 1 GiB when cast; on CPUs it is cast a
few rows at a time into a buffer that stays in cache. Elsewhere, for small weights, in a compiled
graph and under autocast, the plain formula serves.

Shapes: n = product of the input's leading axes, in = in_features, out = out_features.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_builders.kernels.tiles import tiled_matmul

_SMALL_ELEMENTS = 1 << 20  # of a weight that is cast whole: 4 MiB in float32


def cast_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` in the input's dtype. [..., in] -> [..., out]"""
    bias = None if bias is None else bias.to(input.dtype)
    if (
        weight.dtype == input.dtype
        or weight.requires_grad
        or weight.device.type != "cpu"
        or weight.numel() <= _SMALL_ELEMENTS
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
    ):
        return F.linear(input, weight.to(input.dtype), bias)
    output = _CastLinear.apply(input.reshape(-1, input.shape[-1]), weight, bias)  # [n, out]
    return output.view(*input.shape[:-1], output.shape[-1])


class _CastLinear(torch.autograd.Function):
    """Keeps the weight as it is stored; the gradient of the input casts it again."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _product(input, weight, bias, transposed=True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        (weight,) = ctx.saved_tensors
        grad_input = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = _product(grad, weight, None, transposed=False)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)
        return grad_input, None, grad_bias


def _product(input: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool) -> Tensor:
    def decode(rows: slice, columns: slice, out: Tensor) -> None:
        out.copy_(weight[rows, columns])

    return tiled_matmul(
        input, bias, decode, shape=weight.shape, transposed=transposed, column_multiple=1
    )
