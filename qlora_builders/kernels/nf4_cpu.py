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

from qlora_builders.kernels.build import BuildError, Library
from qlora_builders.kernels.formats import NOT_FINITE
from qlora_builders.kernels.nf4_reference import (
    DTYPE_NUMBERS,
    FORMAT_NUMBERS,
    NF4Format,
    dynamic_codebook,
    encode_scales,
)
from qlora_builders.kernels.products import tiled_matmul

_ARGUMENTS = {"qlora_quantize_nf4": 11, "qlora_dequantize_nf4": 15, "qlora_matmul_nf4_rows": 15}
_LIBRARY = Library(
    "nf4_cpu",
    files=sorted(Path(__file__).parent.glob("nf4_cpu*.[ch]")),
    flags=("-O3", "-march=native", "-ffp-contract=off", "-fPIC", "-shared", "-std=gnu11"),
    functions=tuple(_ARGUMENTS),
)
_FEW_ROWS = 4  # of input: MOST_ROWS of nf4_cpu_rows.c


def supports(format: NF4Format, *dtypes: torch.dtype) -> bool:
    """Whether the kernels take these dtypes here (and compile at all)."""
    return all(dtype in DTYPE_NUMBERS for dtype in dtypes) and _library() is not None


def quantize(weight: Tensor, *, format: NF4Format) -> tuple[Tensor, Tensor, Tensor]:
    """As `nf4_reference.quantize`; a strided weight is copied first."""
    weight = weight.contiguous()
    codes_shape, scales_shape, groups_shape = format.field_shapes(weight.shape)
    is_bnb = format.scale_format == "bnb"
    codes = torch.empty(codes_shape, dtype=torch.uint8)
    scales = torch.empty(scales_shape, dtype=torch.float32 if is_bnb else format.scale_dtype)
    groups = torch.empty(groups_shape, dtype=torch.float32)
    status = _call(
        "qlora_quantize_nf4",
        *(weight, codes, scales, groups, weight.numel()),
        *_numbers(format, weight.dtype),
        format.scale_search,
    )
    if status == 1:
        raise ValueError(NOT_FINITE)
    if status:
        raise MemoryError("out of memory while quantizing a weight")
    if is_bnb:
        scales, groups = encode_scales(scales, format=format, dtype=weight.dtype)
    return codes, scales, groups


def dequantize(
    fields: Sequence[Tensor],
    *,
    format: NF4Format,
    shape: Sequence[int],
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    """As `nf4_reference.dequantize`."""
    out = torch.empty(*shape, dtype=out_dtype)
    dequantize_range_(out, fields, format=format, start=0, dtype=dtype)
    return out


def dequantize_range_(
    out: Tensor,
    fields: Sequence[Tensor],
    *,
    format: NF4Format,
    start: int,
    stride: int | None = None,
    dtype: torch.dtype,
) -> None:
    """Decode the elements from `start` (a multiple of block_size) into all of contiguous `out`.

    With `stride`, out's second row is what begins so much later in the weight, and so on; strides
    and the length of out's rows are then multiples of block_size, too.
    """
    rows, count = (1, out.numel()) if stride is None else out.shape
    assert out.is_contiguous()
    assert start % format.block_size == 0
    assert stride is None or (stride % format.block_size == 0 and count % format.block_size == 0)
    _call(
        "qlora_dequantize_nf4",
        *(*fields, dynamic_codebook()),
        *_numbers(format, dtype),
        *(out, DTYPE_NUMBERS[out.dtype], start, count, rows, stride or 0),
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
    """As `nf4_reference.matmul`, decoding a part of the weight at a time.

    With AVX-512, few rows of input are multiplied without that, which adds up in another order.
    """
    columns, block_size = shape[1], format.block_size
    if transposed and len(input) <= _FEW_ROWS and columns % block_size == 0:
        even_then_odd = input.float().unflatten(1, (-1, 2)).transpose(1, 2).contiguous()
        output = torch.empty(len(input), shape[0])
        failed = _call(
            "qlora_matmul_nf4_rows",
            *(*fields, dynamic_codebook()),
            *_numbers(format, dtype),
            *(even_then_odd, DTYPE_NUMBERS[input.dtype], output, len(input), *shape),
        )
        if not failed:
            return (output if bias is None else output.add_(bias)).to(input.dtype)

    def decode(part: slice, some: slice, out: Tensor) -> None:
        dequantize_range_(
            out,
            fields,
            format=format,
            start=part.start * columns + some.start,
            stride=None if out.shape[1] == columns else columns,
            dtype=dtype,
        )

    return tiled_matmul(
        input,
        bias,
        decode,
        shape=shape,
        transposed=transposed,
        row_multiple=block_size // math.gcd(columns, block_size),  # a tile begins with a block
        column_multiple=block_size if columns % block_size == 0 else None,
    )


def _numbers(format: NF4Format, dtype: torch.dtype) -> tuple[int, int, int, int]:
    number = FORMAT_NUMBERS[format.scale_format]
    return format.block_size, format.scale_block_size, number, DTYPE_NUMBERS[dtype]


def _call(function: str, *arguments: Tensor | int) -> int:
    """Tensors go as pointers, and all is 64 bits wide; the last argument is the threads to use."""
    words = [a if isinstance(a, int) else a.data_ptr() for a in arguments]
    status: int = getattr(_library(), function)(*words, torch.get_num_threads())
    return status


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        library = _LIBRARY.load()
    except BuildError as error:
        warnings.warn(
            "the NF4 CPU kernels could not be compiled, so the slow PyTorch reference is used; "
            f"install a C compiler or set CC. {error}",
            stacklevel=2,
        )
        return None
    for function, count in _ARGUMENTS.items():
        getattr(library, function).argtypes = [ctypes.c_int64] * count
    return library
