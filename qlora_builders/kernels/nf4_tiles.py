"""Products with an NF4 weight that is never decoded as a whole: some of its rows at a time.

On CPUs a tile stays in cache and nothing the size of the weight is allocated: page faults on a
fresh 64 MiB cost three times the decoding. On GPUs a tile bounds the scratch memory, which would be
a gigabyte for the head of a Llama 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def matmul_by_tiles(
    input: Tensor,
    bias: Tensor | None,
    *,
    shape: Sequence[int],
    transposed: bool,
    block_size: int,
    tile_elements: int,
    scratch: Callable[[int], Tensor],
    decode_: Callable[..., Any],
) -> Tensor:
    """As `nf4_reference.matmul_nf4`.

    A weight of one tile gives the very bits of the dense product. Over several, `input @ W` adds up
    in another order, in float32 whatever the input's dtype.

    Args:
        tile_elements: of the weight decoded at once, rounded to whole rows that begin a block.
        scratch: numel -> memory for a tile, in the input's dtype.
        decode_: (out [numel], start=) decodes that part of the weight into `out`.
    """
    out_features, in_features = shape
    step = block_size // math.gcd(in_features, block_size)  # a tile begins with a block
    tile = min(max(1, tile_elements // max(1, in_features * step)) * step, out_features)
    buffer = scratch(tile * in_features)
    partial = not transposed and tile < out_features  # sums that go on over tiles
    output = input.new_empty(
        (input.shape[0], out_features if transposed else in_features),
        dtype=torch.float32 if partial else input.dtype,
    )
    for first in range(0, out_features, tile):
        rows = slice(first, min(first + tile, out_features))
        weight = buffer[: (rows.stop - first) * in_features].view(-1, in_features)
        decode_(weight.view(-1), start=first * in_features)
        if transposed and bias is not None:
            torch.addmm(bias[rows], input, weight.t(), out=output[:, rows])
        elif transposed:
            torch.mm(input, weight.t(), out=output[:, rows])
        elif input.dtype == output.dtype:
            torch.addmm(output, input[:, rows], weight, beta=float(first > 0), out=output)
        elif first == 0:
            output.copy_(input[:, rows] @ weight)
        else:
            output += input[:, rows] @ weight
    return output.to(input.dtype)
