"""Rotary embedding against transformers: frequencies, tables and the rotation itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qlora_builders.modules import (
    RotaryEmbedding,
    apply_rope,
    linear_scaled,
    llama3_scaled,
    rope_frequencies,
)

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


def test_llama3_scaling_keeps_fast_rotations_and_slows_slow_ones() -> None:
    plain, scaled = rope_frequencies(64, 10_000.0), ours(64, 10_000.0, "llama3", **LLAMA3)
    assert scaled[0] == plain[0]
    assert scaled[-1] == plain[-1] / 8
    assert all(p / 8 <= s <= p for p, s in zip(plain, scaled, strict=True))


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


def test_scores_depend_on_distance_alone() -> None:
    rotary = RotaryEmbedding(rope_frequencies(16, 10_000.0))
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(query_at: int, key_at: int) -> torch.Tensor:
        tables = [rotary(torch.tensor([[at]]), torch.float32) for at in (query_at, key_at)]
        return (apply_rope(q, *tables[0]) * apply_rope(k, *tables[1])).sum()

    torch.testing.assert_close(score(5, 3), score(105, 103), rtol=1e-4, atol=1e-4)
    assert not torch.isclose(score(5, 3), score(5, 4), atol=1e-3)


def test_casting_or_emptying_a_module_cannot_lose_the_frequencies() -> None:
    rotary = RotaryEmbedding(rope_frequencies(16, 10_000.0))
    positions = torch.tensor([[0, 9]])
    cos, _ = rotary(positions, torch.float32)
    rotary.to(torch.bfloat16).to("meta").to_empty(device="cpu")
    assert torch.equal(rotary(positions, torch.float32)[0], cos)
    assert rotary.state_dict() == {}
