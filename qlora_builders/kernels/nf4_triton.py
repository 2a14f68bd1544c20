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
from qlora_builders.kernels.nf4_reference import (
    MIDPOINTS,
    NF4_CODEBOOK,
    NOT_FINITE,
    SEARCHED_FACTORS,
    dynamic_codebook,
    encode_scales,
    field_shapes,
    num_blocks,
)
from qlora_builders.kernels.tiles import tiled_matmul

_PROGRAM_ELEMENTS = 4096  # 32 a thread with 4 warps
_LARGEST_GROUP = 4096  # scales that one program encodes
_MATVEC_BATCH = 8  # inputs of at most this many rows take the matrix-vector kernel
_MATVEC_ROWS = 8  # weight rows of a program, so that the input is read once for 8 of them
_MATVEC_ELEMENTS = 512  # of a weight row in a step
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FORMATS = {"geometric": 0, "none": 1, "bnb": 2}


def supports(scale_format: str, *dtypes: torch.dtype) -> bool:
    """Whether the kernels take this format and these dtypes."""
    return scale_format in _FORMATS and all(dtype in _DTYPES for dtype in dtypes)


def quantize_nf4(
    weight: Tensor,
    *,
    block_size: int,
    scale_block_size: int,
    scale_format: str,
    scale_search: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `nf4_reference.quantize_nf4`; a strided weight is copied first."""
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
        if scale_search:
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
        scales, groups = _encode_scales(wanted, scale_block_size, scale_format, weight.dtype)
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
            SCALE_BLOCK_SIZE=scale_block_size,
            FORMAT=_FORMATS[scale_format],
            SMALLEST_NORMAL=torch.finfo(weight.dtype).tiny,
            **tile,
        )
    return codes, scales, groups


def _encode_scales(
    absmax: Tensor, scale_block_size: int, scale_format: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    options: dict[str, Any] = {"scale_block_size": scale_block_size, "scale_format": scale_format}
    if scale_format != "geometric" or scale_block_size > _LARGEST_GROUP:
        return encode_scales(absmax, dtype=dtype, **options)
    _, (count,), (group_count, _) = field_shapes(absmax.numel(), block_size=1, **options)
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
    """As `nf4_reference.dequantize_nf4`."""
    out = torch.empty(numel, dtype=out_dtype, device=codes.device)
    dequantize_range_(
        out,
        codes,
        scales,
        scale_groups,
        start=0,
        block_size=block_size,
        scale_block_size=scale_block_size,
        scale_format=scale_format,
        dtype=dtype,
    )
    return out


def dequantize_range_(
    out: Tensor,
    codes: Tensor,
    scales: Tensor,
    scale_groups: Tensor,
    *,
    start: int,
    block_size: int,
    scale_block_size: int,
    scale_format: str,
    dtype: torch.dtype,
) -> None:
    """Decode the elements from `start` (a multiple of block_size) into all of contiguous `out`."""
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
            SCALE_BLOCK_SIZE=scale_block_size,
            ROWS=rows,
            FORMAT=_FORMATS[scale_format],
            DTYPE=_DTYPES[dtype],
            OUT_DTYPE=_DTYPES[out.dtype],
        )


def matmul_nf4(
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
    """As `nf4_reference.matmul_nf4`: for a few tokens in one pass, else by tiles."""
    fields = (codes, scales, scale_groups)
    options: dict[str, Any] = {
        "block_size": block_size,
        "scale_block_size": scale_block_size,
        "scale_format": scale_format,
        "dtype": dtype,
    }
    if transposed and input.shape[0] <= _MATVEC_BATCH and shape[1] % block_size == 0:
        return _matvec(input, *fields, bias, shape=shape, **options)

    def decode(rows: slice, _all: slice, out: Tensor) -> None:
        dequantize_range_(out, *fields, start=rows.start * shape[1], **options)

    return tiled_matmul(
        input,
        bias,
        decode,
        shape=shape,
        transposed=transposed,
        row_multiple=block_size // math.gcd(shape[1], block_size),  # a tile begins with a block
    )


def _matvec(
    input: Tensor,
    codes: Tensor,
    scales: Tensor,
    scale_groups: Tensor,
    bias: Tensor | None,
    *,
    shape: Sequence[int],
    block_size: int,
    scale_block_size: int,
    scale_format: str,
    dtype: torch.dtype,
) -> Tensor:
    """input [m, in], m at most 8 -> [m, out]."""
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
            BLOCKS=max(1, _MATVEC_ELEMENTS // block_size),
            BLOCK_SIZE=block_size,
            SCALE_BLOCK_SIZE=scale_block_size,
            FORMAT=_FORMATS[scale_format],
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
