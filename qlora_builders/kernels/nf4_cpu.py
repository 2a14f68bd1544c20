"""Calls the CPU kernels, `nf4_cpu_*.c`, which `build` compiles and keeps.

The C compiler runs once per machine and source version, about two seconds. The library shares
torch's OpenMP threads and honours `torch.get_num_threads()`. Without a working compiler the PyTorch
reference is used, with one warning: the results are the same, quantizing is then about a hundred
times slower.
"""

from __future__ import annotations

import ctypes
import functools
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from qlora_builders.kernels.build import Sources, load_library
from qlora_builders.kernels.compiler import CompilerError
from qlora_builders.kernels.nf4_reference import (
    NOT_FINITE,
    dynamic_codebook,
    encode_scales,
    field_shapes,
)
from qlora_builders.kernels.tiles import tiled_matmul

_SOURCES = Sources(
    "nf4_cpu",
    files=sorted(Path(__file__).parent.glob("nf4_cpu_*.c")),
    headers=[Path(__file__).with_name("nf4_cpu.h")],
    flags=("-O3", "-march=native", "-ffp-contract=off", "-fPIC", "-shared", "-std=gnu11"),
    functions=("qlora_quantize_nf4", "qlora_dequantize_nf4", "qlora_matmul_nf4_rows"),
)
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FORMATS = {"geometric": 0, "none": 1, "bnb": 2}
_NOT_FINITE = 1
_FEW_ROWS = 4  # of input: MOST_ROWS of nf4_cpu_rows.c


def supports(scale_format: str, *dtypes: torch.dtype) -> bool:
    """Whether the kernels take this format and these dtypes here (and compile at all)."""
    known = scale_format in _FORMATS and all(dtype in _DTYPES for dtype in dtypes)
    return known and _library() is not None


def quantize_nf4(
    weight: Tensor,
    *,
    block_size: int,
    scale_block_size: int,
    scale_format: str,
    scale_search: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `nf4_reference.quantize_nf4`; a strided weight is copied first."""
    weight = weight.contiguous()
    codes_shape, scales_shape, groups_shape = field_shapes(
        weight.numel(),
        block_size=block_size,
        scale_block_size=scale_block_size,
        scale_format=scale_format,
    )
    codes = torch.empty(codes_shape, dtype=torch.uint8)
    scale_dtype = torch.uint8 if scale_format == "geometric" else torch.float32
    scales = torch.empty(scales_shape, dtype=scale_dtype)
    groups = torch.empty(groups_shape, dtype=torch.float32)
    library = _library()
    assert library is not None
    status = library.qlora_quantize_nf4(
        weight.data_ptr(),
        codes.data_ptr(),
        scales.data_ptr(),
        groups.data_ptr(),
        weight.numel(),
        block_size,
        scale_block_size,
        _FORMATS[scale_format],
        _DTYPES[weight.dtype],
        scale_search,
        torch.get_num_threads(),
    )
    if status == _NOT_FINITE:
        raise ValueError(NOT_FINITE)
    if status:
        raise MemoryError("out of memory while quantizing a weight")
    if scale_format == "bnb":
        scales, groups = encode_scales(
            scales, scale_block_size=scale_block_size, scale_format="bnb", dtype=weight.dtype
        )
    return codes, scales, groups


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
    out = torch.empty(numel, dtype=out_dtype)
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
    stride: int | None = None,
    block_size: int,
    scale_block_size: int,
    scale_format: str,
    dtype: torch.dtype,
) -> None:
    """Decode the elements from `start` (a multiple of block_size) into all of contiguous `out`.

    With `stride`, out's second row is what begins so much later in the weight, and so on; strides
    and the length of out's rows are then multiples of block_size, too.
    """
    library = _library()
    assert library is not None
    assert out.is_contiguous()
    rows, count = (1, out.numel()) if stride is None else out.shape
    assert start % block_size == 0
    assert stride is None or (stride % block_size == 0 and count % block_size == 0)
    library.qlora_dequantize_nf4(
        codes.data_ptr(),
        scales.data_ptr(),
        scale_groups.data_ptr(),
        dynamic_codebook().data_ptr(),
        out.data_ptr(),
        start,
        count,
        rows,
        stride or 0,
        block_size,
        scale_block_size,
        _FORMATS[scale_format],
        _DTYPES[dtype],
        _DTYPES[out.dtype],
        torch.get_num_threads(),
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
    """As `nf4_reference.matmul_nf4`, decoding a part of the weight at a time.

    With AVX-512, few rows of input are multiplied without that, which adds up in another order.
    """
    if transposed and len(input) <= _FEW_ROWS and shape[1] % block_size == 0:
        output = _matmul_rows(
            input,
            codes,
            scales,
            scale_groups,
            shape=shape,
            block_size=block_size,
            scale_block_size=scale_block_size,
            scale_format=scale_format,
            dtype=dtype,
        )
        if output is not None:
            return (output if bias is None else output.add_(bias)).to(input.dtype)

    def decode(rows: slice, columns: slice, out: Tensor) -> None:
        dequantize_range_(
            out,
            codes,
            scales,
            scale_groups,
            start=rows.start * shape[1] + columns.start,
            stride=None if out.shape[1] == shape[1] else shape[1],
            block_size=block_size,
            scale_block_size=scale_block_size,
            scale_format=scale_format,
            dtype=dtype,
        )

    return tiled_matmul(
        input,
        bias,
        decode,
        shape=shape,
        transposed=transposed,
        row_multiple=block_size // math.gcd(shape[1], block_size),  # a tile begins with a block
        column_multiple=block_size if shape[1] % block_size == 0 else None,
    )


def _matmul_rows(
    input: Tensor,
    codes: Tensor,
    scales: Tensor,
    scale_groups: Tensor,
    *,
    shape: Sequence[int],
    block_size: int,
    scale_block_size: int,
    scale_format: str,
    dtype: torch.dtype,
) -> Tensor | None:
    """`input @ W.T` in float32; None where the library has no code for it."""
    rows, (out_features, in_features) = len(input), shape
    even_then_odd = input.float().unflatten(1, (-1, 2)).transpose(1, 2).contiguous()
    output = torch.empty(rows, out_features)
    library = _library()
    assert library is not None
    failed = library.qlora_matmul_nf4_rows(
        even_then_odd.data_ptr(),
        codes.data_ptr(),
        scales.data_ptr(),
        scale_groups.data_ptr(),
        dynamic_codebook().data_ptr(),
        output.data_ptr(),
        rows,
        out_features,
        in_features,
        block_size,
        scale_block_size,
        _FORMATS[scale_format],
        _DTYPES[dtype],
        _DTYPES[input.dtype],
        torch.get_num_threads(),
    )
    return None if failed else output


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        library = load_library(_SOURCES)
    except CompilerError as error:
        warnings.warn(
            "the NF4 CPU kernels could not be compiled, so the slow PyTorch reference is used; "
            f"install a C compiler or set CC. {error}",
            stacklevel=2,
        )
        return None
    pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    library.qlora_quantize_nf4.argtypes = [pointer] * 4 + [size] * 3 + [integer] * 4
    library.qlora_dequantize_nf4.argtypes = [pointer] * 5 + [size] * 6 + [integer] * 4
    library.qlora_dequantize_nf4.restype = None
    library.qlora_matmul_nf4_rows.argtypes = [pointer] * 6 + [integer] + [size] * 4 + [integer] * 4
    return library
