"""NF4 kernels on plain tensors, one signature for every backend, chosen here by device.

`nf4_reference` defines the result; `nf4_cpu` and `nf4_triton` give it faster. Each function is a
`torch.library` op, so that `torch.compile` and `torch.export` see one opaque call whose output
shape is known; on the meta device that is all there is, and models can be built without memory.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qlora_builders.kernels import nf4_cpu, nf4_reference
from qlora_builders.kernels.nf4_reference import (
    NF4_CODEBOOK,
    WEIGHT_DTYPES,
    field_dtypes,
    field_shapes,
)

__all__ = [
    "NF4_CODEBOOK",
    "WEIGHT_DTYPES",
    "dequantize_nf4",
    "field_dtypes",
    "field_shapes",
    "matmul_nf4",
    "quantize_nf4",
]

_library = torch.library.Library("qlora_builders", "DEF")
_library.define(
    "quantize_nf4(Tensor weight, *, int block_size, int scale_block_size, str scale_format,"
    " bool scale_search=False) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "dequantize_nf4(Tensor codes, Tensor scales, Tensor scale_groups, *, int numel, int block_size,"
    " int scale_block_size, str scale_format, ScalarType dtype, ScalarType out_dtype) -> Tensor"
)
_library.define(
    "matmul_nf4(Tensor input, Tensor codes, Tensor scales, Tensor scale_groups, Tensor? bias, *,"
    " int[] shape, bool transposed, int block_size, int scale_block_size, str scale_format,"
    " ScalarType dtype) -> Tensor"
)


def _backend(device: torch.device, scale_format: str, *dtypes: torch.dtype) -> ModuleType:
    """The fastest that takes this format and these dtypes on this device."""
    compiled = nf4_cpu if device.type == "cpu" else _triton_backend()
    if compiled is not None and compiled.supports(scale_format, *dtypes):
        return compiled
    return nf4_reference


@functools.cache
def _triton_backend() -> ModuleType | None:
    try:
        return importlib.import_module("qlora_builders.kernels.nf4_triton")
    except ImportError as error:
        warnings.warn(
            "Triton is not installed, so the slow PyTorch reference serves NF4 weights on this "
            f"GPU: pip install triton. {error}",
            stacklevel=2,
        )
        return None


def _quantize_nf4(weight: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    backend = _backend(weight.device, options["scale_format"], weight.dtype)
    return backend.quantize_nf4(weight, **options)


def _dequantize_nf4(codes: Tensor, *fields: Tensor, **options: Any) -> Tensor:
    dtypes = options["dtype"], options["out_dtype"]
    backend = _backend(codes.device, options["scale_format"], *dtypes)
    return backend.dequantize_nf4(codes, *fields, **options)


def _matmul_nf4(input: Tensor, *fields: Any, **options: Any) -> Tensor:
    backend = _backend(input.device, options["scale_format"], options["dtype"], input.dtype)
    return backend.matmul_nf4(input, *fields, **options)


for _key in ("CPU", "CUDA"):
    _library.impl("quantize_nf4", _quantize_nf4, _key)
    _library.impl("dequantize_nf4", _dequantize_nf4, _key)
    _library.impl("matmul_nf4", _matmul_nf4, _key)


@torch.library.register_fake("qlora_builders::matmul_nf4", lib=_library)
def _matmul_nf4_fake(
    input: Tensor,
    codes: Tensor,
    scales: Tensor,
    scale_groups: Tensor,
    bias: Tensor | None,
    *,
    shape: Sequence[int],
    transposed: bool,
    block_size: int,
    scale_block_size: int,
    scale_format: str,
    dtype: torch.dtype,
) -> Tensor:
    return input.new_empty(input.shape[0], shape[0] if transposed else shape[1])


def _keep_for_backward(
    ctx: Any, inputs: tuple, keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    ctx.save_for_backward(*inputs[1:4])  # the 4-bit fields, nothing decoded
    ctx.options = keyword_only_inputs


def _matmul_nf4_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """x W^T and x W are each other's gradient, so derivatives of any order work."""
    options = {**ctx.options, "transposed": not ctx.options["transposed"]}
    grad_input = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_input = matmul_nf4(grad, *ctx.saved_tensors, **options)
    if ctx.needs_input_grad[4]:
        grad_bias = grad.sum(0)
    return grad_input, None, None, None, grad_bias


torch.library.register_autograd(
    "qlora_builders::matmul_nf4",
    _matmul_nf4_backward,
    setup_context=_keep_for_backward,
    lib=_library,
)


@torch.library.register_fake("qlora_builders::quantize_nf4", lib=_library)
def _quantize_nf4_fake(
    weight: Tensor,
    *,
    block_size: int,
    scale_block_size: int,
    scale_format: str,
    scale_search: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    codes, scales, groups = field_shapes(
        weight.numel(),
        block_size=block_size,
        scale_block_size=scale_block_size,
        scale_format=scale_format,
    )
    code_dtype, scale_dtype, group_dtype = field_dtypes(scale_format)
    return (
        weight.new_empty(codes, dtype=code_dtype),
        weight.new_empty(scales, dtype=scale_dtype),
        weight.new_empty(groups, dtype=group_dtype),
    )


@torch.library.register_fake("qlora_builders::dequantize_nf4", lib=_library)
def _dequantize_nf4_fake(
    codes: Tensor,
    scales: Tensor,
    scale_groups: Tensor,
    *,
    numel: int,
    block_size: int,
    scale_block_size: int,
    scale_format: str,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty(numel, dtype=out_dtype)


def quantize_nf4(
    weight: Tensor,
    *,
    block_size: int,
    scale_block_size: int,
    scale_format: str,
    scale_search: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scales, scale_groups) of a finite weight; `nf4_reference` describes the layout."""
    return torch.ops.qlora_builders.quantize_nf4(
        weight,
        block_size=block_size,
        scale_block_size=scale_block_size,
        scale_format=scale_format,
        scale_search=scale_search,
    )


def dequantize_nf4(
    codes: Tensor,
    scales: Tensor,
    scale_groups: Tensor,
    *,
    numel: int,
    block_size: int,
    scale_block_size: int,
    scale_format: str,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    """A flat [numel] tensor, rounded to the weight's own `dtype`, then cast to `out_dtype`."""
    return torch.ops.qlora_builders.dequantize_nf4(
        codes,
        scales,
        scale_groups,
        numel=numel,
        block_size=block_size,
        scale_block_size=scale_block_size,
        scale_format=scale_format,
        dtype=dtype,
        out_dtype=out_dtype,
    )


def matmul_nf4(
    input: Tensor,
    codes: Tensor,
    scales: Tensor,
    scale_groups: Tensor,
    bias: Tensor | None = None,
    *,
    shape: Sequence[int],
    transposed: bool,
    block_size: int,
    scale_block_size: int,
    scale_format: str,
    dtype: torch.dtype,
) -> Tensor:
    """`input @ W.T + bias` (transposed) or `input @ W` for a weight of `shape` (out, in)."""
    return torch.ops.qlora_builders.matmul_nf4(
        input,
        codes,
        scales,
        scale_groups,
        bias,
        shape=shape,
        transposed=transposed,
        block_size=block_size,
        scale_block_size=scale_block_size,
        scale_format=scale_format,
        dtype=dtype,
    )
