"""Products into given memory, whichever library multiplies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qlora_builders.kernels import products
from qlora_builders.kernels.products import add_matmul, linear, linear_out, matmul, tiled_matmul

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
