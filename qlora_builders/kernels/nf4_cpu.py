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
from qlora_builders.kernels.formats import NOT_FINITE
from qlora_builders.kernels.nf4_format import NF4Format, dynamic_codebook, encode_scales
from qlora_builders.kernels.products import tiled_matmul

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


def supports(format: NF4Format, *dtypes: torch.dtype) -> bool:
    """Whether the kernels take this format and these dtypes here (and compile at all)."""
    known = format.scale_format in _FORMATS and all(dtype in _DTYPES for dtype in dtypes)
    return known and _library() is not None


def quantize(weight: Tensor, *, format: NF4Format) -> tuple[Tensor, Tensor, Tensor]:
    """As `nf4_reference.quantize`; a strided weight is copied first."""
    weight = weight.contiguous()
    codes_shape, scales_shape, groups_shape = format.field_shapes(weight.shape)
    codes = torch.empty(codes_shape, dtype=torch.uint8)
    scale_dtype = torch.uint8 if format.scale_format == "geometric" else torch.float32
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
        format.block_size,
        format.scale_block_size,
        _FORMATS[format.scale_format],
        _DTYPES[weight.dtype],
        format.scale_search,
        torch.get_num_threads(),
    )
    if status == _NOT_FINITE:
        raise ValueError(NOT_FINITE)
    if status:
        raise MemoryError("out of memory while quantizing a weight")
    if format.scale_format == "bnb":
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
    codes, scales, scale_groups = fields
    library = _library()
    assert library is not None
    assert out.is_contiguous()
    rows, count = (1, out.numel()) if stride is None else out.shape
    assert start % format.block_size == 0
    assert stride is None or (stride % format.block_size == 0 and count % format.block_size == 0)
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
        format.block_size,
        format.scale_block_size,
        _FORMATS[format.scale_format],
        _DTYPES[dtype],
        _DTYPES[out.dtype],
        torch.get_num_threads(),
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
        output = _matmul_rows(input, fields, format=format, shape=shape, dtype=dtype)
        if output is not None:
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


def _matmul_rows(
    input: Tensor,
    fields: Sequence[Tensor],
    *,
    format: NF4Format,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor | None:
    """`input @ W.T` in float32; None where the library has no code for it."""
    codes, scales, scale_groups = fields
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
        format.block_size,
        format.scale_block_size,
        _FORMATS[format.scale_format],
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
