"""Products with a weight that is stored in another form, a part of it at a time.

On CPUs a part is decoded into a small buffer that is used again and again, so the product finds
them in cache and nothing the size of the weight is allocated: page faults on a fresh 64 MiB cost
three times the decoding of NF4 (4096 x 4096 bfloat16, two cores: 12.3 ms to copy into fresh memory,
4.3 to decode into old). On GPUs a tile bounds the scratch memory, which would be a gigabyte for the
head of a Llama 3.

A part is 8 MiB of float32 on CPUs, where each thread keeps one buffer, and 128 MiB of bfloat16 on
GPUs, where it is given back after each call. It is a number of rows; or, for `input @ W`, of
columns if these are many, because parts by rows give sums to add up (CPU time of 512 tokens times
4096 x 14336 in NF4, AMD EPYC: 613 ms instead of 722 in float32, 333 instead of 478 in bfloat16).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qlora_builders.kernels.products import add_matmul, linear, linear_out, matmul

_TILE_ELEMENTS = 1 << 21  # of a weight decoded at once: 8 MiB in float32
_GPU_TILE_ELEMENTS = 1 << 26  # 128 MiB in bfloat16
_FEWEST_COLUMNS = 512  # fewer are decoded too slowly
_local = threading.local()


def tiled_matmul(
    input: Tensor,
    bias: Tensor | None,
    decode: Callable[[slice, slice, Tensor], None],
    *,
    shape: Sequence[int],
    transposed: bool,
    row_multiple: int = 1,
    column_multiple: int | None = None,
) -> Tensor:
    """`input @ W.T + bias` (transposed) or `input @ W` for a weight of `shape` (out, in).

    A weight of one part gives the very bits of the dense product (if `products.py` has PyTorch's
    default multiply). Over several parts by rows, `input @ W` rounds each product to the input's
    dtype and adds them up in float32.

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
        empty = input.new_zeros(input.shape[0], width)
        return empty if bias is None else empty + bias
    elements = _TILE_ELEMENTS if input.device.type == "cpu" else _GPU_TILE_ELEMENTS
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
        output = input.new_empty(input.shape[0], width)
        for part in rows:
            part_bias = None if bias is None else bias[part]
            linear_out(input, decoded(part, all_columns), part_bias, out=output[:, part])
        return output
    if column_multiple is not None:
        columns = elements // (out_features * column_multiple) * column_multiple
        if columns >= _FEWEST_COLUMNS:
            output = input.new_empty(input.shape[0], width)
            for part in _parts(in_features, columns):
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
    if like.device.type != "cpu":
        return like.new_empty(numel)
    key = str(like.dtype)
    buffer = getattr(_local, key, None)
    if buffer is None or buffer.numel() < numel:
        buffer = torch.empty(numel, dtype=like.dtype)
        setattr(_local, key, buffer)
    return buffer[:numel]
