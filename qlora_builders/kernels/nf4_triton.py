"""Launches the Triton kernels on CUDA tensors, with the signatures of `nf4_reference`.

`nf4_triton_kernels` explains how they work. This file needs Triton, so it is imported when the
first CUDA tensor comes.
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
from qlora_builders.kernels.nf4_reference import (
    DTYPE_NUMBERS,
    FORMAT_NUMBERS,
    MIDPOINTS,
    NF4_CODEBOOK,
    SEARCHED_FACTORS,
    NF4Format,
    dynamic_codebook,
    encode_scales,
    num_blocks,
)
from qlora_builders.kernels.products import tiled_matmul

_PROGRAM_ELEMENTS = 4096  # 32 a thread with 4 warps
_LARGEST_GROUP = 4096  # scales that one program encodes
_MATVEC_BATCH = 8  # inputs of at most this many rows take the matrix-vector kernel
_MATVEC_ROWS = 8  # weight rows of a program, so that the input is read once for 8 of them
_MATVEC_ELEMENTS = 512  # of a weight row in a step


def supports(format: NF4Format, *dtypes: torch.dtype) -> bool:
    """Whether the kernels take these dtypes."""
    return all(dtype in DTYPE_NUMBERS for dtype in dtypes)


def quantize(weight: Tensor, *, format: NF4Format) -> tuple[Tensor, Tensor, Tensor]:
    """As `nf4_reference.quantize`; a strided weight is copied first."""
    flat, device = _bits(weight.contiguous().view(-1)), weight.device
    blocks, rows = num_blocks(flat.numel(), format.block_size), _tile_rows(format.block_size)
    absmax = torch.empty(blocks, dtype=torch.float32, device=device)
    tables, programs = _tables(device), num_blocks(blocks, rows)
    tile: dict[str, Any] = {
        "weight": flat,
        "absmax": absmax,
        "numel": flat.numel(),
        "num_blocks": blocks,
        "BLOCK_SIZE": format.block_size,
        "ROWS": rows,
        "DTYPE": DTYPE_NUMBERS[weight.dtype],
    }
    with torch.cuda.device_of(weight):
        _launch(kernels.absmax_kernel, programs, **tile)
        if not torch.isfinite(absmax).all():
            raise ValueError(NOT_FINITE)
        wanted = absmax
        if format.scale_search:
            wanted = torch.empty_like(absmax)
            _launch(
                kernels.search_kernel,
                programs,
                wanted=wanted,
                codebook=tables["codebook"],
                factors=tables["factors"],
                LEVELS=format.block_size.bit_length() - 1,
                **tile,
            )
        scales, groups = _encode_scales(wanted, format, weight.dtype)
        codes = flat.new_empty(-(-flat.numel() // 2), dtype=torch.uint8)
        _launch(
            kernels.codes_kernel,
            programs,
            codes=codes,
            scales=scales,
            groups=groups,
            codebook=tables["codebook"],
            **tile,
            SCALE_BLOCK_SIZE=format.scale_block_size,
            FORMAT=FORMAT_NUMBERS[format.scale_format],
            SMALLEST_NORMAL=torch.finfo(weight.dtype).tiny,
        )
    return codes, scales, groups


def _encode_scales(absmax: Tensor, format: NF4Format, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    size, count = format.scale_block_size, absmax.numel()
    if format.scale_format != "geometric" or size > _LARGEST_GROUP:
        return encode_scales(absmax, format=format, dtype=dtype)
    scales = absmax.new_empty(count, dtype=torch.uint8)
    groups = absmax.new_empty(num_blocks(count, size), 2)
    _launch(
        kernels.encode_scales_kernel,
        len(groups),
        absmax=absmax,
        scales=scales,
        groups=groups,
        num_blocks=count,
        SCALE_BLOCK_SIZE=size,
        LANES=1 << (size - 1).bit_length(),
        DTYPE=DTYPE_NUMBERS[dtype],
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
    out: Tensor, fields: Sequence[Tensor], *, format: NF4Format, start: int, dtype: torch.dtype
) -> None:
    """Decode the elements from `start` (a multiple of block_size) into all of contiguous `out`."""
    block_size, count = format.block_size, out.numel()
    assert out.is_contiguous()
    assert start % block_size == 0
    rows = _tile_rows(block_size)
    with torch.cuda.device_of(out):
        _launch(
            kernels.dequantize_kernel,
            num_blocks(num_blocks(count, block_size), rows),
            **_stored(fields, format, dtype),
            out=_bits(out.view(-1)),
            first_block=start // block_size,
            count=count,
            num_bytes=(count + 1) // 2,
            ROWS=rows,
            OUT_DTYPE=DTYPE_NUMBERS[out.dtype],
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
        return _matvec(input, bias, shape[0], format, _stored(fields, format, dtype))

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
    input: Tensor, bias: Tensor | None, out_features: int, format: NF4Format, stored: dict[str, Any]
) -> Tensor:
    """input [m, in], m at most 8 -> [m, out]."""
    m, in_features = input.shape
    output = input.new_empty(m, out_features)
    with torch.cuda.device_of(input):
        _launch(
            kernels.matvec_kernel,
            num_blocks(out_features, _MATVEC_ROWS),
            **stored,
            x=_bits(input.contiguous()),
            bias=_bits(output if bias is None else bias),
            out=_bits(output),
            rows_in=m,
            in_features=in_features,
            out_features=out_features,
            BATCH=1 << (m - 1).bit_length(),
            ROWS=_MATVEC_ROWS,
            BLOCKS=max(1, _MATVEC_ELEMENTS // format.block_size),
            OUT_DTYPE=DTYPE_NUMBERS[input.dtype],
            HAS_BIAS=bias is not None,
            enable_fp_fusion=True,
        )
    return output


def _stored(fields: Sequence[Tensor], format: NF4Format, dtype: torch.dtype) -> dict[str, Any]:
    """What a kernel that decodes has to know of a weight."""
    codes, scales, groups = fields
    tables = _tables(codes.device)
    return {
        "codes": codes,
        "scales": scales,
        "groups": groups,
        "codebook": tables["codebook"],
        "scale_codebook": tables["scale_codebook"],
        "BLOCK_SIZE": format.block_size,
        "SCALE_BLOCK_SIZE": format.scale_block_size,
        "FORMAT": FORMAT_NUMBERS[format.scale_format],
        "DTYPE": DTYPE_NUMBERS[dtype],
    }


def _launch(
    kernel: Any, programs: int, *, enable_fp_fusion: bool = False, **arguments: Any
) -> None:
    """Without fusion a product is rounded before anything is added to it, as elsewhere."""
    if programs:
        kernel[(programs,)](**arguments, enable_fp_fusion=enable_fp_fusion)


def _tile_rows(block_size: int) -> int:
    return max(1, _PROGRAM_ELEMENTS // block_size)


def _bits(x: Tensor) -> Tensor:
    """bfloat16 as int16, which the kernels (and Triton's interpreter) can round exactly."""
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


@functools.cache
def _tables(device: torch.device) -> dict[str, Tensor]:
    """The 16 values and the 15 midpoints between them; the values of bnb's scales; factors."""
    tables = {
        "codebook": torch.cat([NF4_CODEBOOK, MIDPOINTS]),
        "scale_codebook": dynamic_codebook(),
        "factors": torch.tensor(SEARCHED_FACTORS, dtype=torch.float32, device="cpu"),
    }
    return {name: table.to(device) for name, table in tables.items()}
