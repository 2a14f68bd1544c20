"""Products with plain weights: into given memory, of another dtype, by either library."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_builders.kernels import products
from qlora_builders.kernels.products import (
    add_matmul,
    cast_linear,
    linear,
    linear_out,
    matmul,
    tiled_matmul,
)

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN"
)


@pytest.fixture(params=["default", pytest.param("onednn", marks=needs_onednn)])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(products, "_mkl_is_slow", lambda: request.param == "onednn")
    return request.param


def tensors(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(rows, 96, generator=generator),
        torch.randn(40, 96, generator=generator),
        torch.randn(40, generator=generator),
    )


def check(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 63, 64, 200])
def test_linear_into_some_columns(library: str, rows: int, with_bias: bool) -> None:
    x, weight, bias = tensors(rows)
    whole = torch.full((rows, 60), 7.0)
    linear_out(x, weight, bias if with_bias else None, out=whole[:, 10:50])
    expected = x.double() @ weight.double().t() + (bias.double() if with_bias else 0)
    check(whole[:, 10:50], expected)
    assert (whole[:, :10] == 7).all()
    assert (whole[:, 50:] == 7).all()


@pytest.mark.parametrize("rows", [1, 64, 200])
def test_products_and_sums_of_some_columns(library: str, rows: int) -> None:
    x, weight, bias = tensors(rows)
    check(linear(x, weight, bias), x.double() @ weight.double().t() + bias.double())
    grad = torch.randn(rows, 60, generator=torch.Generator().manual_seed(1))[:, 10:50]
    out = matmul(grad, weight)
    check(out, grad.double() @ weight.double())
    add_matmul(grad, weight, out=out)
    check(out, 2 * grad.double() @ weight.double())


def test_sums_of_another_dtype(library: str) -> None:
    _, weight, _ = tensors(64)
    grad = torch.ones(64, 40, dtype=torch.bfloat16)
    out = torch.full((64, 96), 0.001)  # lost in bfloat16
    add_matmul(grad, weight.bfloat16(), out=out)
    assert torch.equal(out, 0.001 + (grad @ weight.bfloat16()).float())


def test_where_pytorch_chooses_the_bits_are_its_own(library: str) -> None:
    x, weight, _ = tensors(63)
    out = torch.empty(63, 40)
    linear_out(x, weight, None, out=out)
    assert torch.equal(out, x @ weight.t())
    x, weight, _ = (t.bfloat16() for t in tensors(64))
    out = torch.empty(64, 40, dtype=torch.bfloat16)
    linear_out(x, weight, None, out=out)
    assert torch.equal(out, x @ weight.t())


@needs_onednn
def test_onednn_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_mkl_is_slow", lambda: True)
    x, _, _ = tensors(64)
    assert products._onednn_is_faster(x)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not products._onednn_is_faster(x)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_weights_without_elements(shape: tuple[int, int]) -> None:
    """An empty sum is zero."""

    def decode(rows: slice, columns: slice, out: Tensor) -> None:
        raise AssertionError("nothing to decode")

    bias = torch.ones(shape[0])
    x, grad = torch.ones(3, shape[1]), torch.ones(3, shape[0])
    out = tiled_matmul(x, bias, decode, shape=shape, transposed=True)
    assert torch.equal(out, torch.ones(3, shape[0]))
    out = tiled_matmul(grad, None, decode, shape=shape, transposed=False)
    assert torch.equal(out, torch.zeros(3, shape[1]))


# ---- a frozen weight of another dtype -----------------------------------------------------------


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
