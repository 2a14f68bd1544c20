"""`scale_search`: less error for the same bits, and the same round-trip guarantee."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qlora_builders import FrozenNF4Linear, to_nf4

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def error(weight: Tensor, decoded: Tensor) -> float:
    return ((decoded.double() - weight.double()).norm() / weight.double().norm()).item()


@pytest.mark.parametrize("scale_format", ["geometric", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normal_weights_lose_five_percent_of_their_error(
    dtype: torch.dtype, scale_format: str
) -> None:
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    plain = to_nf4(weight, scale_format=scale_format)
    searched = to_nf4(weight, scale_format=scale_format, scale_search=True)
    assert searched.nbytes == plain.nbytes
    assert error(weight, searched.dequantize()) < 0.95 * error(weight, plain.dequantize())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip_changes_no_bit_with_or_without_another_search(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(40, 100, generator=generator)
    tiny = torch.finfo(dtype).tiny
    outlier = normal.clone()
    outlier[3, 3] = 400
    for weight in (normal, outlier, normal * tiny, normal * tiny * 16, torch.zeros(5, 64)):
        first = to_nf4(weight.to(dtype), block_size=32, scale_search=True)
        decoded = first.dequantize()
        for search in (True, False):
            second = to_nf4(decoded, block_size=32, scale_search=search)
            for name in first.tensor_fields:
                assert torch.equal(getattr(first, name), getattr(second, name))
            assert torch.equal(second.dequantize(), decoded)


def test_a_module_searches_when_it_loads() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 128)
    layer = FrozenNF4Linear(128, 64, dtype=torch.float32, scale_search=True)
    layer.load_state_dict({"weight": weight})
    expected = to_nf4(weight, scale_search=True).dequantize()
    assert torch.equal(layer.state_dict()["weight"], expected)
    assert not torch.equal(expected, to_nf4(weight).dequantize())


def test_bnb_has_no_search() -> None:
    with pytest.raises(ValueError, match="scale_search cannot be combined with scale_format 'bnb'"):
        to_nf4(torch.randn(64), scale_format="bnb", scale_search=True)
