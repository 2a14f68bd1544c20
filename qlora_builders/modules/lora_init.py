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

import torch
from torch import Tensor

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
