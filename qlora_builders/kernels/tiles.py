"""Products with a weight that is stored in another form, some of its rows at a time.

On CPUs the rows are decoded into a small buffer that is used again and again, so the product finds
them in cache and nothing the size of the weight is allocated: page faults on a fresh 64 MiB cost
three times the decoding of NF4 (4096 x 4096 bfloat16, two cores: 12.3 ms to copy into fresh memory,
4.3 to decode into old). On GPUs a tile bounds the scratch memory, which would be a gigabyte for the
head of a Llama 3.

A tile is 8 MiB of float32 on CPUs, where each thread keeps one buffer, and 128 MiB of bfloat16 on
GPUs, where it is given back after each call; at least `row_multiple` rows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qlora_builders.kernels.products import add_matmul, linear, linear_out, matmul

_TILE_ELEMENTS = 1 << 21  # of a weight decoded at once: 8 MiB in float32
_GPU_TILE_ELEMENTS = 1 << 26  # 128 MiB in bfloat16
_local = threading.local()


def tiled_matmul(
    input: Tensor,
    bias: Tensor | None,
    decode: Callable[[int, Tensor], None],
    *,
    shape: Sequence[int],
    transposed: bool,
    row_multiple: int = 1,
) -> Tensor:
    """`input @ W.T + bias` (transposed) or `input @ W` for a weight of `shape` (out, in).

    A weight of one tile gives the very bits of the dense product (if `products.py` has PyTorch's
    default multiply). Over several, `input @ W` rounds each tile's product to the input's dtype and
    adds them up in float32.

    Args:
        input: [n, in] if transposed, else [n, out].
        bias: [out], used if transposed.
        decode: (first, buffer [rows, in]) writes the rows from `first` in the input's dtype.
        row_multiple: what `first` has to be a multiple of.
    """
    out_features, in_features = shape
    width = out_features if transposed else in_features
    if 0 in shape:
        empty = input.new_zeros(input.shape[0], width)
        return empty if bias is None else empty + bias
    elements = _TILE_ELEMENTS if input.device.type == "cpu" else _GPU_TILE_ELEMENTS
    tile = max(1, elements // (in_features * row_multiple)) * row_multiple
    buffer = _buffer(min(tile, out_features) * in_features, input)

    def decoded(rows: slice) -> Tensor:
        weight = buffer[: (rows.stop - rows.start) * in_features].view(-1, in_features)
        decode(rows.start, weight)
        return weight

    if tile >= out_features:
        weight = decoded(slice(0, out_features))
        return linear(input, weight, bias) if transposed else matmul(input, weight)
    first, *others = (
        slice(start, min(start + tile, out_features)) for start in range(0, out_features, tile)
    )
    if transposed:
        output = input.new_empty(input.shape[0], width)
        for rows in (first, *others):
            part = None if bias is None else bias[rows]
            linear_out(input, decoded(rows), part, out=output[:, rows])
        return output
    total = matmul(input[:, first], decoded(first)).float()
    for rows in others:
        add_matmul(input[:, rows], decoded(rows), out=total)
    return total.to(input.dtype)


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
