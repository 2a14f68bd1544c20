"""NF4Tensor.copy_: bits between equal formats, else a new quantization."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nf4_tensors import assert_same, make

from qlora_builders.tensor import NF4Tensor, to_nf4

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def test_copy_between_equal_formats_copies_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    source, destination = make(seed=1), make(seed=2)
    monkeypatch.setattr(NF4Tensor, "dequantize", None)
    codes = destination.codes
    assert destination.copy_(source) is destination
    assert_same(destination, source)
    assert destination.codes is codes  # in place


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_copy_from_a_plain_weight_quantizes_with_the_destinations_options(
    dtype: torch.dtype,
) -> None:
    destination = make(block_size=32, scale_block_size=3)
    plain = torch.randn(30, 70).to(dtype)
    destination.copy_(plain)
    assert_same(destination, to_nf4(plain.bfloat16(), block_size=32, scale_block_size=3))


@pytest.mark.parametrize("options", [{"block_size": 32}, {"scale_format": "none"}])
def test_copy_from_another_format_requantizes(options: dict[str, Any]) -> None:
    source, destination = make(seed=1), make(seed=2, **options)
    destination.copy_(source)
    assert_same(destination, to_nf4(source.dequantize(), **options))


def test_copy_from_another_dtype_requantizes() -> None:
    source, destination = make(seed=1, dtype=torch.float32), make(seed=2)
    destination.copy_(source)
    assert_same(destination, to_nf4(source.dequantize().bfloat16()))


def test_copy_into_a_plain_tensor_dequantizes() -> None:
    weight, plain = make(), torch.zeros(30, 70)
    plain.copy_(weight)
    assert torch.equal(plain, weight.dequantize().float())


@pytest.mark.parametrize("nf4_source", [True, False])
def test_copy_refuses_another_shape_even_of_the_same_size(nf4_source: bool) -> None:
    source = make(70, 30)
    with pytest.raises(ValueError, match=r"shape \[70, 30\] into one of shape \[30, 70\]"):
        make(30, 70).copy_(source if nf4_source else source.dequantize())


def test_copy_refuses_a_weight_with_nan() -> None:
    destination = make()
    before = destination.clone()
    bad = torch.zeros(30, 70)
    bad[3, 4] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        destination.copy_(bad)
    assert_same(destination, before)
