"""DoRA's norms and output: a weight's rows keep their direction, their lengths train.

    W' = m / |W + scaling B A| * (W + scaling B A)         (https://arxiv.org/abs/2402.09353)

with the norm taken of each row and treated as a constant by the gradient (section 4.3 there). It
changes with every step, yet W + scaling B A is never built, because

    |w + s b A|^2 = |w|^2 + 2 s b (A w) + s^2 b (A A^T) b^T        (w, b: rows of W and B)

where |w|^2 never changes, A w is a product of W with r rows, and A A^T is r x r.

Shapes: n = rows of the input, in = in_features, out = out_features, r = rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS_AT_ONCE = 256


def row_squares(weight: Tensor) -> Tensor:
    """|w|^2 of each row of a plain weight [out, in], float32 [out]; a few rows at a time."""
    norms = [
        torch.linalg.vector_norm(weight[start : start + _ROWS_AT_ONCE].float(), dim=1)
        for start in range(0, len(weight), _ROWS_AT_ONCE)
    ]
    return torch.cat(norms).square()


def updated_norms(squares: Tensor, products: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """|w + scale b A| of each row, float32 [out].

    Args:
        squares: `row_squares` of the weight, [out].
        products: A W^T, [r, out].
        a, b: [r, in] and [out, r], float32.

    A row whose norm is zero (w and b are) gets the smallest float32 instead: its output is zero,
    where a division by zero would make it NaN.
    """
    products = products.float().t()  # [out, r]
    cross = (b * (2 * products + scale * (b @ (a @ a.t())))).sum(1)  # [out]
    tiny = torch.finfo(torch.float32).tiny
    return (squares + scale * cross).clamp_min(tiny).sqrt()
