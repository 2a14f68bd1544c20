"""Rotary embedding and RMSNorm against those of transformers, bit for bit where dtypes allow."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qlora_builders.modules import RMSNorm, RotaryEmbedding, apply_rope
from qlora_builders.modules.rope import linear_scaled, llama3_scaled, rope_frequencies

transformers = pytest.importorskip("transformers")
modeling = pytest.importorskip("transformers.models.llama.modeling_llama")

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def theirs(head_dim: int, theta: float, **scaling: Any) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": theta, **scaling},
    )
    return modeling.LlamaRotaryEmbedding(config)


def ours(head_dim: int, theta: float, rope_type: str = "default", **scaling: Any) -> list[float]:
    frequencies = rope_frequencies(head_dim, theta)
    if rope_type == "linear":
        return linear_scaled(frequencies, **scaling)
    if rope_type == "llama3":
        return llama3_scaled(frequencies, **scaling)
    return frequencies


CASES = [
    {},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "llama3", **LLAMA3},
    {"rope_type": "llama3", **LLAMA3, "factor": 32.0, "high_freq_factor": 8.0},
]


@pytest.mark.parametrize("scaling", CASES, ids=str)
@pytest.mark.parametrize(("head_dim", "theta"), [(64, 10_000.0), (128, 500_000.0), (6, 1e6)])
def test_frequencies_equal_transformers(
    head_dim: int, theta: float, scaling: dict[str, Any]
) -> None:
    expected = theirs(head_dim, theta, **scaling).inv_freq
    got = torch.tensor(ours(head_dim, theta, **scaling))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tables_and_rotation_equal_transformers(dtype: torch.dtype) -> None:
    positions = torch.tensor([[0, 1, 2, 300], [7, 8, 9, 10]])
    x = torch.randn(2, 4, 4, 16).to(dtype)
    cos, sin = RotaryEmbedding(rope_frequencies(16, 10_000.0))(positions, dtype)
    assert (cos.shape, cos.dtype) == ((2, 1, 4, 16), dtype)
    cos_, sin_ = theirs(16, 10_000.0)(x, positions)
    torch.testing.assert_close(cos.squeeze(1), cos_, rtol=0, atol=1e-6)
    torch.testing.assert_close(sin.squeeze(1), sin_, rtol=0, atol=1e-6)
    expected, _ = modeling.apply_rotary_pos_emb(x, x, cos.squeeze(1), sin.squeeze(1))
    assert torch.equal(apply_rope(x, cos, sin), expected)


def test_casting_or_emptying_a_module_cannot_lose_the_frequencies() -> None:
    rotary = RotaryEmbedding(rope_frequencies(16, 10_000.0))
    positions = torch.tensor([[0, 9]])
    cos, _ = rotary(positions, torch.float32)
    rotary.to(torch.bfloat16).to("meta").to_empty(device="cpu")
    assert torch.equal(rotary(positions, torch.float32)[0], cos)
    assert rotary.state_dict() == {}


# ---- RMSNorm ------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [1e-5, 1e-2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_equals_transformers(dtype: torch.dtype, eps: float) -> None:
    ours, theirs = RMSNorm(48, eps=eps, dtype=dtype), modeling.LlamaRMSNorm(48, eps=eps).to(dtype)
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


def test_rms_norms_input_decides_the_dtype() -> None:
    norm = RMSNorm(8, eps=1e-5, dtype=torch.float32)
    assert norm(torch.randn(3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_zeros_stay_zeros_and_huge_values_do_not_overflow() -> None:
    norm = RMSNorm(8, eps=1e-5, dtype=torch.float16)
    assert not norm(torch.zeros(2, 8, dtype=torch.float16)).any()
    huge = norm(torch.full((2, 8), 60_000.0, dtype=torch.float16))
    assert torch.equal(huge, torch.ones_like(huge))


def test_rms_norms_repr() -> None:
    assert repr(RMSNorm(8, eps=1e-5)) == "RMSNorm(dim=8, eps=1e-05)"
