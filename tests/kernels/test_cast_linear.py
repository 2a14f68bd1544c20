"""A frozen weight of another dtype, cast some rows at a time, gives F.linear's results."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qlora_builders.kernels import products
from qlora_builders.kernels.products import cast_linear


@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("tile", [100, 1 << 21])
def test_equals_linear_on_the_cast_weight(
    input_dtype: torch.dtype, has_bias: bool, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "SMALL_ELEMENTS", 0)
    monkeypatch.setitem(products.TILE_ELEMENTS, "cpu", tile)
    torch.manual_seed(0)
    weight = torch.randn(13, 24, dtype=torch.float16)
    results = []
    for function in (cast_linear, F.linear):
        torch.manual_seed(1)
        x = torch.randn(2, 5, 24).to(input_dtype).requires_grad_()
        bias = torch.randn(13, dtype=input_dtype, requires_grad=True) if has_bias else None
        own = weight if function is cast_linear else weight.to(input_dtype)
        output = function(x, own, bias)
        output.square().sum().backward()
        results.append((output.detach(), x.grad, bias.grad if bias is not None else None))
    tolerance = 1e-5 if input_dtype == torch.float32 else 0.05
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_no_copy_of_the_weight_is_kept_for_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "SMALL_ELEMENTS", 0)
    weight, x = torch.randn(13, 24, dtype=torch.bfloat16), torch.randn(3, 24, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        cast_linear(x, weight, None)
    assert [t.data_ptr() for t in saved] == [weight.data_ptr()]


def test_under_autocast_and_with_a_trained_weight_the_plain_formula_serves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "SMALL_ELEMENTS", 0)
    x, weight = torch.randn(3, 24), torch.randn(13, 24, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert cast_linear(x, weight, None).dtype == torch.bfloat16
    weight.requires_grad_()
    cast_linear(x, weight, None).sum().backward()
    assert weight.grad is not None
