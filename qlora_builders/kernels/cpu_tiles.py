"""Products with a weight that is stored in another form, some of its rows at a time, on CPUs.

The rows are decoded into a small buffer that is used again and again, so the product finds them in
cache and nothing the size of the weight is allocated: page faults on a fresh 64 MiB cost three
times the decoding of NF4.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_TILE_ELEMENTS = 1 << 21  # of a weight decoded at once: 8 MiB in float32
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

    A weight of one tile gives the very bits of the dense product; over several, `input @ W` adds
    up in another order.

    Args:
        input: [n, in] if transposed, else [n, out].
        bias: [out], used if transposed.
        decode: (first, buffer [rows, in]) writes the rows from `first` in the input's dtype.
        row_multiple: what `first` has to be a multiple of.
    """
    out_features, in_features = shape
    tile = max(1, _TILE_ELEMENTS // (in_features * row_multiple)) * row_multiple
    buffer = _buffer(min(tile, out_features) * in_features, input.dtype)
    output = input.new_empty(input.shape[0], out_features if transposed else in_features)
    for first in range(0, out_features, tile):
        rows = slice(first, min(first + tile, out_features))
        weight = buffer[: (rows.stop - first) * in_features].view(-1, in_features)
        decode(first, weight)
        if not transposed:
            beta = 0 if first == 0 else 1
            torch.addmm(output, input[:, rows], weight, beta=beta, out=output)
        elif bias is None:
            torch.mm(input, weight.t(), out=output[:, rows])
        else:
            torch.addmm(bias[rows], input, weight.t(), out=output[:, rows])
    return output


def _buffer(numel: int, dtype: torch.dtype) -> Tensor:
    """Scratch memory of this thread; autograd runs backward in threads of its own."""
    buffer = getattr(_local, str(dtype), None)
    if buffer is None or buffer.numel() < numel:
        buffer = torch.empty(numel, dtype=dtype)
        setattr(_local, str(dtype), buffer)
    return buffer[:numel]
