"""DoRA's norms and output: a weight's rows keep their direction, their lengths train.

    W' = m / |W + scaling B A| * (W + scaling B A)         (https://arxiv.org/abs/2402.09353)

with the norm taken of each row and treated as a constant by the gradient (section 4.3 there). It
changes with every step, yet W + scaling B A is never built, because

    |w + s b A|^2 = |w|^2 + 2 s b (A w) + s^2 b (A A^T) b^T        (w, b: rows of W and B)

where |w|^2 never changes, A w is a product of W with r rows, and A A^T is r x r.

Shapes: n = rows of the input, in = in_features, out = out_features, r = rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qlora_builders.modules.linear import linear
from qlora_builders.tensor import plain

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


class Magnitudes:
    """The part of a `LoRALinear` that trains the lengths of its rows. The layer holds the tensors:

    `lora_magnitude_vector`  float32 [out], trains; starts as the lengths of W + scaling B A
    `base_squares`           float32 [out], |w|^2; follows the weight and is never saved
    """

    def add_to(self, layer: Any, device: torch.device | str | None) -> None:
        lengths = torch.empty(layer.out_features, device=device, dtype=torch.float32)
        layer.lora_magnitude_vector = nn.Parameter(lengths)
        layer.register_buffer("base_squares", None, persistent=False)
        layer.register_load_state_dict_post_hook(_after_load)

    def base_changed(self, layer: Any) -> None:
        if layer.weight.is_meta:
            layer.base_squares = torch.empty(layer.out_features, device="meta")
        else:
            layer.base_squares = row_squares(plain(layer.weight))

    def fill(self, layer: Any) -> None:
        # replaced, not written to, because it may still be on meta
        layer.lora_magnitude_vector = nn.Parameter(self.lengths(layer, torch.float32))

    @torch.no_grad()
    def lengths(self, layer: Any, dtype: torch.dtype) -> Tensor:
        """|W + scaling B A| of each row, float32 [out]; the product with W is in `dtype`."""
        a, b = (factor.float() for factor in layer.stored_factors())
        products = linear(a.to(dtype), layer.weight, None)  # [r, out]
        return updated_norms(layer.base_squares, products, a, b, layer.scaling)

    def stretch(self, layer: Any, output: Tensor, scaled: Tensor) -> Tensor:
        """The layer's output, without its bias, at the trained lengths. [n, out]

        Args:
            scaled: what the magnitudes act on: the output, with dropout that of the dropped input.
        """
        # not by stretch itself, which is 1.0078 in bfloat16 for 1.005
        stretch = layer.lora_magnitude_vector / self.lengths(layer, output.dtype)
        return torch.addcmul(output, scaled, (stretch - 1).to(output.dtype))

    def delta(self, layer: Any, update: Tensor, weight: Tensor) -> Tensor:
        """W' - W for a plain weight and its update, float32 [out, in]."""
        base = weight.float()
        whole = base + update
        stretch = layer.lora_magnitude_vector.float() / row_squares(whole).sqrt()
        # a row of zeros stays one
        return whole.mul_(stretch.nan_to_num_(nan=0.0)[:, None]).sub_(base)


def _after_load(layer: Any, incompatible_keys: Any) -> None:
    """load_state_dict post-hook. A model on meta is being filled, and asks when it is whole."""
    if not layer.lora_magnitude_vector.is_meta:
        layer.base_changed()
