"""What a `LoRALinear` may have besides A and B: DoRA's magnitudes, and a start for the factors.

A part has no tensors of its own: it adds them to the layer, whose names files know, and computes
with them.

Shapes: n = rows of the input, in = in_features, out = out_features, r = rank.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_builders.tensor import linear, plain

DEFAULT_INIT, PISSA, LOFTQ = "default", "pissa", "loftq"
_ROWS_AT_ONCE = 256


# ---- DoRA ---------------------------------------------------------------------------------------


class Magnitudes:
    """DoRA (https://arxiv.org/abs/2402.09353): rows keep their direction, their lengths train.

        W' = m / |W + scaling B A| * (W + scaling B A)

    with the norm taken of each row and treated as a constant by the gradient (section 4.3 there).
    It changes with every step, yet W + scaling B A is never built, because

        |w + s b A|^2 = |w|^2 + 2 s b (A w) + s^2 b (A A^T) b^T        (w, b: rows of W and B)

    where |w|^2 never changes, A w is a product of W with r rows, and A A^T is r x r.

    Tensors of the layer: the trained `lora_magnitude_vector` float32 [out], m, which starts as the
    lengths of W + scaling B A; and `base_squares` float32 [out], |w|^2, which follows the weight
    and is never saved.
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

    def output(self, layer: Any, rows: Tensor, dropped: Tensor, down: Tensor) -> Tensor:
        """The layer's at the trained lengths [n, out], from rows and dropped rows [n, in].

        Args:
            down: the dropped rows through A, [n, r].
        """
        output = scaled = layer.updated(rows, down, None)  # [n, out]
        if layer.training and not isinstance(layer.dropout, nn.Identity):
            scaled = layer.updated(dropped, down, None)
        # not by stretch itself, which is 1.0078 in bfloat16 for 1.005
        stretch = layer.lora_magnitude_vector / self.lengths(layer, output.dtype)
        output = torch.addcmul(output, scaled, (stretch - 1).to(output.dtype))
        return output if layer.bias is None else output + layer.bias.to(output.dtype)

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


def row_squares(weight: Tensor) -> Tensor:
    """|w|^2 of each row of a plain weight [out, in], float32 [out]; a few rows at a time."""
    parts = weight.split(_ROWS_AT_ONCE)
    return torch.cat([torch.linalg.vector_norm(p.float(), dim=1) for p in parts]).square()


def updated_norms(squares: Tensor, products: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """|w + scale b A| of each row, float32 [out], for float32 A [r, in] and B [out, r].

    Args:
        squares: `row_squares` of the weight, [out].
        products: A W^T, [r, out].

    A row whose norm is zero (w and b are) gets the smallest float32 instead: its output is zero,
    where a division by zero would make it NaN.
    """
    products = products.float().t()  # [out, r]
    cross = (b * (2 * products + scale * (b @ (a @ a.t())))).sum(1)  # [out]
    tiny = torch.finfo(torch.float32).tiny
    return (squares + scale * cross).clamp_min(tiny).sqrt()


# ---- where A and B start ------------------------------------------------------------------------


def is_pissa(init: str | None) -> bool:
    return init is not None and init.startswith(PISSA)


def stored_rank(rank: int, init: str | None) -> int:
    """The rank in an adapter file, where PiSSA's frozen start is part of the adapter."""
    return 2 * rank if is_pissa(init) else rank


@dataclass(frozen=True)
class Start:
    """Where A and B start. All leave the base as it is, so that an adapter stays one for the base
    it was trained on.

    default  A at random, B at zero.
    pissa    (https://arxiv.org/abs/2404.02948) trains the principal part of the weight. It takes
             that part out of the base; here the base keeps it and the adapter subtracts it, frozen:
             W + s (B A - B0 A0), the same function with the same gradients. That is a LoRA of twice
             the rank, [B, -B0] [A; A0], and is written as one. `pissa_niter_N` approximates the
             part by N iterations of a randomized decomposition.
    loftq    (https://arxiv.org/abs/2310.08659), with one iteration: the best correction of rank r
             for what quantization changed. More iterations would quantize another weight.

    Tensors of the layer: under PiSSA the frozen `lora_A_init` [r, in] and `lora_B_init` [out, r].

    Raises:
        ValueError: for another name.
    """

    init: str

    def __post_init__(self) -> None:
        known = (DEFAULT_INIT, PISSA, LOFTQ)
        if self.init not in known and not re.fullmatch(r"pissa_niter_[1-9]\d*", str(self.init)):
            raise ValueError(
                f"init_lora_weights is {self.init!r}; allowed: {', '.join(known)} and "
                "pissa_niter_N, a faster pissa with N iterations, such as pissa_niter_4"
            )

    def add_to(self, layer: Any) -> None:
        """
        Raises:
            ValueError: if the weight has fewer directions than the rank.
        """
        most = min(layer.in_features, layer.out_features)
        if self.init != DEFAULT_INIT and layer.rank > most:
            raise ValueError(
                f"rank is {layer.rank}; with init_lora_weights={self.init!r} a weight "
                f"[{layer.out_features}, {layer.in_features}] allows {most} at most"
            )
        for name, factor in (("lora_A_init", layer.lora_A), ("lora_B_init", layer.lora_B)):
            like = factor.weight
            # not by zeros_like, which has torch import its compiler on meta
            start = torch.zeros(like.shape, device=like.device, dtype=like.dtype)
            kept = nn.Parameter(start, requires_grad=False) if is_pissa(self.init) else None
            layer.register_parameter(name, kept)

    def fill(self, layer: Any, original: Tensor | None) -> None:
        """A and B from the layer's weight, and for LoftQ from what it was before quantization.

        Raises:
            ValueError: if LoftQ has no original.
        """
        if self.init == DEFAULT_INIT:
            return
        matrix = plain(layer.weight).float()
        if self.init == LOFTQ:
            if original is None:
                raise ValueError("init_lora_weights='loftq' needs the weight before quantization")
            matrix = original.to(matrix.device).float() - matrix
        a, b = self._low_rank(matrix, layer.rank, layer.scaling)
        layer.lora_A.weight.copy_(a)
        layer.lora_B.weight.copy_(b)
        if is_pissa(self.init):
            layer.lora_A_init = nn.Parameter(a.clone(), requires_grad=False)
            layer.lora_B_init = nn.Parameter(b.clone(), requires_grad=False)

    def _low_rank(self, matrix: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
        """A and B, balanced, so that scaling * B A is the best approximation of [out, in]."""
        iterations = re.fullmatch(r"pissa_niter_(\d+)", self.init)
        if iterations is None:
            u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        else:  # draws from torch's generator
            u, s, v = torch.svd_lowrank(matrix, rank, niter=int(iterations[1]))
            vh = v.t()
        root = (s[:rank] / scaling).sqrt()  # [r]
        return root[:, None] * vh[:rank], u[:, :rank] * root

    def take_off_(self, layer: Any, rows: Tensor, output: Tensor) -> Tensor:
        """What PiSSA trains of the base, taken off its output [n, out] for rows [n, in]."""
        if layer.lora_A_init is None:
            return output
        down = linear(rows, layer.lora_A_init, None)  # [n, r]
        up = layer.lora_B_init.to(down.dtype).t()  # [r, out]
        return output.addmm_(down, up, alpha=-layer.scaling)

    def factors(self, layer: Any) -> tuple[Tensor, Tensor]:
        """A and B as an adapter file has them: [stored_rank, in] and [out, stored_rank]."""
        a, b = layer.lora_A.weight, layer.lora_B.weight
        if layer.lora_A_init is None:
            return a, b
        return torch.cat([a, layer.lora_A_init]), torch.cat([b, -layer.lora_B_init], dim=1)
