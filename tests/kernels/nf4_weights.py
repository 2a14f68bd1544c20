"""Weights that kernels get wrong, for the tests of every backend."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = ("geometric", "none", "bnb")


def adversarial(dtype: torch.dtype, n: int = 5000) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(n, generator=generator)
    tiny, largest = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    outlier = normal.clone()
    outlier[5] = 500
    zeros = normal.clone()
    zeros[:1000] = 0
    powers = 2.0 ** torch.randint(-14, 15, (n,), generator=generator)
    scales = torch.logspace(-30, 30, n).clamp(tiny / 8, largest / 8)
    weights = {
        "normal": normal,
        "outlier": outlier,
        "zero blocks": zeros,
        "all zero": torch.zeros(n),
        "constant": torch.full((n,), -0.3),
        "powers of two": powers,
        "mixed scales": normal * scales,
        "subnormal": normal * tiny / 4,
        "around the smallest normal": normal * tiny * 16,
        "huge": torch.rand(n, generator=generator) * largest - largest / 2,
    }
    return {name: w.to(dtype).nan_to_num(0, largest, -largest) for name, w in weights.items()}


def bits(x: Tensor) -> Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])
