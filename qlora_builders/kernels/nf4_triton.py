"""Launches the Triton kernels on CUDA tensors, with the signatures of `nf4_reference`.

`nf4_triton_kernels` explains layout, formulas and limits. This file needs Triton, so it is imported
when the first CUDA tensor comes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_builders.kernels import nf4_triton_kernels as kernels
from qlora_builders.kernels.formats import NOT_FINITE
from qlora_builders.kernels.nf4_format import (
    NF4Format,
    dynamic_codebook,
    encode_scales,
    num_blocks,
)
from qlora_builders.kernels.nf4_reference import MIDPOINTS, NF4_CODEBOOK, SEARCHED_FACTORS
from qlora_builders.kernels.products import tiled_matmul

_PROGRAM_ELEMENTS = 4096  # 32 a thread with 4 warps
_LARGEST_GROUP = 4096  # scales that one program encodes
_MATVEC_BATCH = 8  # inputs of at most this many rows take the matrix-vector kernel
_MATVEC_ROWS = 8  # weight rows of a program, so that the input is read once for 8 of them
_MATVEC_ELEMENTS = 512  # of a weight row in a step
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FORMATS = {"geometric": 0, "none": 1, "bnb": 2}


def supports(format: NF4Format, *dtypes: torch.dtype) -> bool:
    """Whether the kernels take this format and these dtypes."""
    return format.scale_format in _FORMATS and all(dtype in _DTYPES for dtype in dtypes)


def quantize(weight: Tensor, *, format: NF4Format) -> tuple[Tensor, Tensor, Tensor]:
    """As `nf4_reference.quantize`; a strided weight is copied first."""
    block_size = format.block_size
    flat = _bits(weight.contiguous().view(-1))
    numel, blocks = flat.numel(), num_blocks(flat.numel(), block_size)
    rows = _tile_rows(block_size)
    tile: dict[str, Any] = {"BLOCK_SIZE": block_size, "ROWS": rows, "DTYPE": _DTYPES[weight.dtype]}
    codebook = _codebook(weight.device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=weight.device)
    grid = num_blocks(blocks, rows)
    with torch.cuda.device_of(weight):
        _launch(kernels.absmax_kernel, grid, flat, absmax, numel, blocks, **tile)
        if not torch.isfinite(absmax).all():
            raise ValueError(NOT_FINITE)
        wanted = absmax
        if format.scale_search:
            wanted = torch.empty_like(absmax)
            _launch(
                kernels.search_kernel,
                grid,
                flat,
                absmax,
                wanted,
                codebook,
                _factors(weight.device),
                numel,
                blocks,
                LEVELS=block_size.bit_length() - 1,
                **tile,
            )
        scales, groups = _encode_scales(wanted, format, weight.dtype)
        codes = flat.new_empty(-(-numel // 2), dtype=torch.uint8)
        _launch(
            kernels.codes_kernel,
            grid,
            flat,
            codes,
            absmax,
            scales,
            groups,
            codebook,
            numel,
            blocks,
            SCALE_BLOCK_SIZE=format.scale_block_size,
            FORMAT=_FORMATS[format.scale_format],
            SMALLEST_NORMAL=torch.finfo(weight.dtype).tiny,
            **tile,
        )
    return codes, scales, groups


def _encode_scales(absmax: Tensor, format: NF4Format, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scale_block_size, count = format.scale_block_size, absmax.numel()
    if format.scale_format != "geometric" or scale_block_size > _LARGEST_GROUP:
        return encode_scales(absmax, format=format, dtype=dtype)
    group_count = num_blocks(count, scale_block_size)
    scales = absmax.new_empty(count, dtype=torch.uint8)
    groups = absmax.new_empty(group_count, 2)
    _launch(
        kernels.encode_scales_kernel,
        group_count,
        absmax,
        scales,
        groups,
        count,
        SCALE_BLOCK_SIZE=scale_block_size,
        LANES=1 << (scale_block_size - 1).bit_length(),
        DTYPE=_DTYPES[dtype],
    )
    return scales, groups


def dequantize(
    fields: Sequence[Tensor],
    *,
    format: NF4Format,
    shape: Sequence[int],
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    """As `nf4_reference.dequantize`."""
    out = torch.empty(*shape, dtype=out_dtype, device=fields[0].device)
    dequantize_range_(out, fields, format=format, start=0, dtype=dtype)
    return out


def dequantize_range_(
    out: Tensor,
    fields: Sequence[Tensor],
    *,
    format: NF4Format,
    start: int,
    dtype: torch.dtype,
) -> None:
    """Decode the elements from `start` (a multiple of block_size) into all of contiguous `out`."""
    codes, scales, scale_groups = fields
    block_size = format.block_size
    assert out.is_contiguous()
    assert start % block_size == 0
    rows = _tile_rows(block_size)
    with torch.cuda.device_of(codes):
        _launch(
            kernels.dequantize_kernel,
            num_blocks(num_blocks(out.numel(), block_size), rows),
            codes,
            scales,
            scale_groups,
            _codebook(codes.device),
            _scale_codebook(codes.device),
            _bits(out.view(-1)),
            start // block_size,
            out.numel(),
            (out.numel() + 1) // 2,
            BLOCK_SIZE=block_size,
            SCALE_BLOCK_SIZE=format.scale_block_size,
            ROWS=rows,
            FORMAT=_FORMATS[format.scale_format],
            DTYPE=_DTYPES[dtype],
            OUT_DTYPE=_DTYPES[out.dtype],
        )


def matmul(
    input: Tensor,
    fields: Sequence[Tensor],
    bias: Tensor | None,
    *,
    format: NF4Format,
    shape: Sequence[int],
    transposed: bool,
    dtype: torch.dtype,
) -> Tensor:
    """As `nf4_reference.matmul`: for a few tokens in one pass, else by tiles."""
    columns, block_size = shape[1], format.block_size
    if transposed and input.shape[0] <= _MATVEC_BATCH and columns % block_size == 0:
        return _matvec(input, fields, bias, format=format, shape=shape, dtype=dtype)

    def decode(rows: slice, _all: slice, out: Tensor) -> None:
        dequantize_range_(out, fields, format=format, start=rows.start * columns, dtype=dtype)

    return tiled_matmul(
        input,
        bias,
        decode,
        shape=shape,
        transposed=transposed,
        row_multiple=block_size // math.gcd(columns, block_size),  # a tile begins with a block
    )


def _matvec(
    input: Tensor,
    fields: Sequence[Tensor],
    bias: Tensor | None,
    *,
    format: NF4Format,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """input [m, in], m at most 8 -> [m, out]."""
    codes, scales, scale_groups = fields
    m, (out_features, in_features) = input.shape[0], shape
    input = input.contiguous()
    output = input.new_empty(m, out_features)
    with torch.cuda.device_of(input):
        _launch(
            kernels.matvec_kernel,
            num_blocks(out_features, _MATVEC_ROWS),
            _bits(input),
            codes,
            scales,
            scale_groups,
            _codebook(input.device),
            _scale_codebook(input.device),
            _bits(output if bias is None else bias),
            _bits(output),
            m,
            in_features,
            out_features,
            BATCH=1 << (m - 1).bit_length(),
            ROWS=_MATVEC_ROWS,
            BLOCKS=max(1, _MATVEC_ELEMENTS // format.block_size),
            BLOCK_SIZE=format.block_size,
            SCALE_BLOCK_SIZE=format.scale_block_size,
            FORMAT=_FORMATS[format.scale_format],
            DTYPE=_DTYPES[dtype],
            OUT_DTYPE=_DTYPES[input.dtype],
            HAS_BIAS=bias is not None,
            enable_fp_fusion=True,
        )
    return output


def _launch(
    kernel: Any, programs: int, *args: Any, enable_fp_fusion: bool = False, **constants: Any
) -> None:
    """Without fusion a product is rounded before anything is added to it, as elsewhere."""
    if programs:
        kernel[(programs,)](*args, **constants, enable_fp_fusion=enable_fp_fusion)


def _tile_rows(block_size: int) -> int:
    return max(1, _PROGRAM_ELEMENTS // block_size)


def _bits(x: Tensor) -> Tensor:
    """bfloat16 as int16, which the kernels (and Triton's interpreter) can round exactly."""
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


@functools.cache
def _codebook(device: torch.device) -> Tensor:
    """The 16 values, then the 15 midpoints between them."""
    return torch.cat([NF4_CODEBOOK, MIDPOINTS]).to(device)


@functools.cache
def _scale_codebook(device: torch.device) -> Tensor:
    return dynamic_codebook().to(device)


@functools.cache
def _factors(device: torch.device) -> Tensor:
    return torch.tensor(SEARCHED_FACTORS, dtype=torch.float32, device=device)
