"""Products with weights that are plain, of another dtype than the input, or stored in codes.

Which library multiplies
    PyTorch multiplies float32 on CPUs with MKL, which runs its best code on Intel's processors
    only. On an AMD EPYC (Zen 4, AVX-512) oneDNN, which PyTorch also ships, takes 0.81 to 0.94 of
    its CPU time from 64 rows on; with fewer, and everywhere else, PyTorch's choice stands. The
    choice depends on the machine and the shape alone, so a resumed run repeats the bits of the
    first.

A part of the weight at a time
    On CPUs a part is decoded into a small buffer that is used again and again, so the product finds
    it in cache and nothing the size of the weight is allocated: page faults on a fresh 64 MiB cost
    three times the decoding of NF4 (4096 x 4096 bfloat16, two cores: 12.3 ms to copy into fresh
    memory, 4.3 to decode into old). On GPUs a tile bounds the scratch memory, which would be a
    gigabyte for the head of a Llama 3.
    A part is 8 MiB of float32 on CPUs, where each thread keeps one buffer, and 128 MiB of bfloat16
    on GPUs, where it is given back after each call. It is a number of rows; or, for `input @ W`, of
    columns if these are many, because parts by rows give sums to add up (CPU time of 512 tokens
    times 4096 x 14336 in NF4, AMD EPYC: 613 ms instead of 722 in float32, 333 instead of 478 in
    bfloat16).

Shapes: n = rows of the input, in = in_features, out = out_features.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_FEW_ROWS = 64
TILE_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}  # of a weight decoded at once
_FEWEST_COLUMNS = 512  # fewer are decoded too slowly
SMALL_ELEMENTS = 1 << 20  # of a weight that `cast_linear` casts whole: 4 MiB in float32
_local = threading.local()


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[n, in] @ [out, in].T + [out]"""
    if _onednn_is_faster(input):
        return _onednn_linear(input, weight, bias)
    return F.linear(input, weight, bias)


def matmul(input: Tensor, weight: Tensor) -> Tensor:
    """[n, out] @ [out, in]"""
    if _onednn_is_faster(input):
        return _onednn_linear(input, weight.t(), None)
    return input @ weight


def linear_out(input: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor) -> None:
    """`linear` into memory that is there, rows of which may lie apart. out: [n, out]"""
    if _onednn_is_faster(input):
        out.copy_(_onednn_linear(input, weight, bias))
    elif bias is not None:
        torch.addmm(bias, input, weight.t(), out=out)
    else:
        torch.mm(input, weight.t(), out=out)


def add_matmul(input: Tensor, weight: Tensor, *, out: Tensor) -> None:
    """out [n, in] += `matmul`, in out's dtype"""
    if input.dtype != out.dtype or _onednn_is_faster(input):
        out.add_(matmul(input, weight))
    else:
        torch.addmm(out, input, weight, out=out)


def _onednn_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return product


def _onednn_is_faster(input: Tensor) -> bool:
    return (
        input.is_cpu
        and input.dtype == torch.float32
        and len(input) >= _FEW_ROWS
        and _mkl_is_slow()
        and bool(torch.backends.mkldnn.enabled)  # the user's switch
    )


@functools.cache
def _mkl_is_slow() -> bool:
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False


# ---- a part of the weight at a time -------------------------------------------------------------


def tiled_matmul(
    input: Tensor,
    bias: Tensor | None,
    decode: Callable[[slice, slice, Tensor], Any],
    *,
    shape: Sequence[int],
    transposed: bool,
    row_multiple: int = 1,
    column_multiple: int | None = None,
) -> Tensor:
    """`input @ W.T + bias` (transposed) or `input @ W` for a weight of `shape` (out, in).

    A weight of one part gives the very bits of the dense product (if PyTorch's default multiplies).
    Over several parts by rows, `input @ W` rounds each product to the input's dtype and adds them
    up in float32.

    Args:
        input: [n, in] if transposed, else [n, out].
        bias: [out], used if transposed.
        decode: (rows, columns, out [rows, columns]) writes that part of W in the input's dtype.
        row_multiple: what the first row has to be a multiple of.
        column_multiple: the same of columns and of their number; None: `decode` takes whole rows.
    """
    out_features, in_features = shape
    width = out_features if transposed else in_features
    if 0 in shape:
        empty = input.new_zeros(len(input), width)
        return empty if bias is None else empty + bias
    elements = TILE_ELEMENTS["cpu" if input.is_cpu else "cuda"]
    tile = max(1, elements // (in_features * row_multiple)) * row_multiple
    all_rows, all_columns = slice(0, out_features), slice(0, in_features)

    def decoded(rows: slice, columns: slice) -> Tensor:
        size = (rows.stop - rows.start, columns.stop - columns.start)
        weight = _buffer(size[0] * size[1], input).view(size)
        decode(rows, columns, weight)
        return weight

    if tile >= out_features:
        weight = decoded(all_rows, all_columns)
        return linear(input, weight, bias) if transposed else matmul(input, weight)
    rows = _parts(out_features, tile)
    if transposed:
        output = input.new_empty(len(input), width)
        for part in rows:
            part_bias = None if bias is None else bias[part]
            linear_out(input, decoded(part, all_columns), part_bias, out=output[:, part])
        return output
    columns = elements // out_features
    if column_multiple is not None and columns - columns % column_multiple >= _FEWEST_COLUMNS:
        output = input.new_empty(len(input), width)
        for part in _parts(in_features, columns - columns % column_multiple):
            output[:, part] = matmul(input, decoded(all_rows, part))
        return output
    total = matmul(input[:, rows[0]], decoded(rows[0], all_columns)).float()
    for part in rows[1:]:
        add_matmul(input[:, part], decoded(part, all_columns), out=total)
    return total.to(input.dtype)


def _parts(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _buffer(numel: int, like: Tensor) -> Tensor:
    """Scratch memory: on CPUs this thread's (autograd runs backward in threads of its own)."""
    if not like.is_cpu:
        return like.new_empty(numel)
    buffer = getattr(_local, key := str(like.dtype), None)
    if buffer is None or buffer.numel() < numel:
        buffer = torch.empty(numel, dtype=like.dtype)
        setattr(_local, key, buffer)
    return buffer[:numel]


# ---- a frozen weight of another dtype -----------------------------------------------------------


def cast_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` in the input's dtype. [..., in] -> [..., out]

    A bfloat16 `lm_head` of 128k x 2048 under float32 compute is 1 GiB when cast; on CPUs it is cast
    a few rows at a time. Elsewhere, for small weights, in a compiled graph and under autocast, the
    plain formula serves.
    """
    bias = None if bias is None else bias.to(input.dtype)
    if (
        weight.dtype == input.dtype
        or weight.requires_grad
        or not weight.is_cpu
        or weight.numel() <= SMALL_ELEMENTS
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
        return _cast_product(input, weight, bias, transposed=True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        (weight,) = ctx.saved_tensors
        grad_input = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = _cast_product(grad, weight, None, transposed=False)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)
        return grad_input, None, grad_bias


def _cast_product(
    input: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool
) -> Tensor:
    def decode(rows: slice, columns: slice, out: Tensor) -> None:
        out.copy_(weight[rows, columns])

    return tiled_matmul(
        input, bias, decode, shape=weight.shape, transposed=transposed, column_multiple=1
    )
