"""`is_finite` agrees with torch on every 16-bit number, and at the edges of the wider ones."""

from __future__ import annotations

import pytest
import torch

from qlora_builders.checkpoint.placing import is_finite

EDGES = (0.0, -0.0, float("inf"), -float("inf"), float("nan"), -float("nan"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number(dtype: torch.dtype) -> None:
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    finite = numbers[numbers.isfinite()]
    assert is_finite(finite)
    assert [is_finite(x) for x in numbers.split(1)] == numbers.isfinite().tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1, -1])
def test_one_number_among_others(dtype: torch.dtype, sign: int) -> None:
    largest = torch.finfo(dtype).max
    for number in (*EDGES, largest, -largest, torch.finfo(dtype).tiny):
        tensor = sign * torch.rand(40, 5).to(dtype)
        tensor[7, 3] = number
        expected = bool(torch.isfinite(tensor).all())
        assert is_finite(tensor) == is_finite(tensor.t()) == expected, number
        assert is_finite(tensor[:7])


def test_nothing_and_parameters() -> None:
    assert is_finite(torch.empty(0, 4))
    assert is_finite(torch.nn.Parameter(torch.ones(2)))
