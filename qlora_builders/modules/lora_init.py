"""Where A and B start, other than at random and at zero: PiSSA and LoftQ.

Both leave the base weight as it is, so that an adapter stays one for the base it was trained on:

- PiSSA (https://arxiv.org/abs/2404.02948) trains the principal part of the weight. It takes that
  part out of the base; here the base keeps it and the adapter subtracts it, frozen:
  W + s (B A - B0 A0), which is the same function with the same gradients. That is a LoRA of twice
  the rank, [B, -B0] [A; A0], and is written as one.
- LoftQ (https://arxiv.org/abs/2310.08659), with one iteration: the best correction of rank r for
  what quantization changed. More iterations would quantize another weight.

Shapes: in = in_features, out = out_features, r = rank.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_builders.modules.linear import linear
from qlora_builders.tensor import plain

DEFAULT, PISSA, LOFTQ = "default", "pissa", "loftq"


def check_init(init: str) -> None:
    """
    Raises:
        ValueError: naming the value and what is allowed.
    """
    known = (DEFAULT, PISSA, LOFTQ)
    if not isinstance(init, str) or not (
        init in known or re.fullmatch(r"pissa_niter_[1-9]\d*", init)
    ):
        raise ValueError(
            f"init_lora_weights is {init!r}; allowed: {', '.join(known)} and pissa_niter_N, a "
            "faster pissa with N iterations, such as pissa_niter_4"
        )


def is_pissa(init: str | None) -> bool:
    return init is not None and init.startswith(PISSA)


def stored_rank(rank: int, init: str | None) -> int:
    """The rank in an adapter file."""
    return 2 * rank if is_pissa(init) else rank


def low_rank(matrix: Tensor, rank: int, scaling: float, init: str) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r], balanced, so that scaling * B A is the matrix's best approximation.

    Args:
        matrix: [out, in], of any float dtype.
        init: `pissa_niter_N` approximates that, by N iterations of a randomized decomposition
            (`torch.svd_lowrank`, which draws from torch's generator).
    """
    iterations = re.fullmatch(r"pissa_niter_(\d+)", init)
    if iterations is None:
        u, s, vh = torch.linalg.svd(matrix.float(), full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(matrix.float(), rank, niter=int(iterations[1]))
        vh = v.t()
    root = (s[:rank] / scaling).sqrt()  # [r]
    return root[:, None] * vh[:rank], u[:, :rank] * root


@dataclass(frozen=True)
class Start:
    """The part of a `LoRALinear` that knows where A and B start. The layer holds all tensors: under
    PiSSA also the frozen `lora_A_init` [r, in] and `lora_B_init` [out, r]."""

    init: str

    def add_to(self, layer: Any) -> None:
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
        if self.init == DEFAULT:
            return
        matrix = plain(layer.weight)
        if self.init == LOFTQ:
            if original is None:
                raise ValueError("init_lora_weights='loftq' needs the weight before quantization")
            matrix = original.to(matrix.device).float() - matrix.float()
        a, b = low_rank(matrix, layer.rank, layer.scaling, self.init)
        layer.lora_A.weight.copy_(a)
        layer.lora_B.weight.copy_(b)
        if layer.lora_A_init is not None:
            layer.lora_A_init = nn.Parameter(a.clone(), requires_grad=False)
            layer.lora_B_init = nn.Parameter(b.clone(), requires_grad=False)

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
