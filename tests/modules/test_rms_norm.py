"""RMSNorm against transformers' module, bit for bit in the dtypes that models use."""

from __future__ import annotations

import pytest
import torch

from qlora_builders.modules import RMSNorm

llama = pytest.importorskip("transformers.models.llama.modeling_llama")


@pytest.mark.parametrize("eps", [1e-5, 1e-2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_transformers(dtype: torch.dtype, eps: float) -> None:
    ours, theirs = RMSNorm(48, eps=eps, dtype=dtype), llama.LlamaRMSNorm(48, eps=eps).to(dtype)
    with torch.no_grad():
        ours.weight.normal_(1.0, 0.3)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 48).mul(3).to(dtype).requires_grad_()
    y = x.detach().clone().requires_grad_()
    output, expected = ours(x), theirs(y)
    assert output.dtype == dtype
    assert torch.equal(output, expected)
    output.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)


def test_the_inputs_dtype_decides() -> None:
    norm = RMSNorm(8, eps=1e-5, dtype=torch.float32)
    assert norm(torch.randn(3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_zeros_stay_zeros_and_huge_values_do_not_overflow() -> None:
    norm = RMSNorm(8, eps=1e-5, dtype=torch.float16)
    assert not norm(torch.zeros(2, 8, dtype=torch.float16)).any()
    huge = norm(torch.full((2, 8), 60_000.0, dtype=torch.float16))
    assert torch.equal(huge, torch.ones_like(huge))


def test_repr() -> None:
    assert repr(RMSNorm(8, eps=1e-5)) == "RMSNorm(dim=8, eps=1e-05)"
