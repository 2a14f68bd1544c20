"""NF4 weights for the tests, and whether two are the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora_builders.tensor import NF4Tensor, to_nf4

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make(
    *shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **options: Any
) -> NF4Tensor:
    return to_nf4(randn(*(shape or (30, 70)), dtype=dtype, seed=seed), **options)


def assert_same(a: Tensor, b: Tensor) -> None:
    assert isinstance(a, NF4Tensor)
    assert isinstance(b, NF4Tensor)
    assert (a.shape, a.dtype, a.format) == (b.shape, b.dtype, b.format)
    for name in NF4Tensor.tensor_fields:
        assert torch.equal(getattr(a, name), getattr(b, name)), name
