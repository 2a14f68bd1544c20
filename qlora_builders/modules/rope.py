"""Rotary position embedding (https://arxiv.org/abs/2104.09864), half-split as Hugging Face has it.

Frequencies are radians per position of each rotated pair, in float32 arithmetic as the checkpoints
assume. What was done to them for a longer context is as in transformers' `modeling_rope_utils`.

Shapes: b = batch, s = sequence, h = heads, d = head_dim, r = rotated dimensions (d, or less).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_LLAMA3 = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


class RotaryEmbedding(nn.Module):
    """cos and sin tables for given positions.

    The frequencies are Python numbers and not a buffer: building on meta, `to_empty` and
    `Module.to(bfloat16)` cannot lose or round them.

    Args:
        frequencies: of the r / 2 pairs.
        scale: multiplies cos and sin, and so the logits of attention by its square.
        limit: of batches with more positions the frequencies are others:
        long: those of longrope, or
        dynamic: theta and factor of dynamic NTK scaling, where they depend on how many there are.
    """

    def __init__(
        self,
        frequencies: list[float],
        *,
        scale: float = 1.0,
        limit: int | None = None,
        long: list[float] | None = None,
        dynamic: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.scale = scale
        self.limit = limit
        self.long = long
        self.dynamic = dynamic

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[b, s] integer positions -> cos, sin [b, 1, s, r] in `dtype`, computed in float32."""
        frequencies = self._at_length(position_ids)
        angles = position_ids[:, None, :, None].float() * frequencies  # [b, 1, s, r / 2]
        angles = torch.cat([angles, angles], dim=-1)
        cos, sin = angles.cos(), angles.sin()
        if self.scale != 1:
            cos, sin = cos * self.scale, sin * self.scale
        return cos.to(dtype), sin.to(dtype)

    def _at_length(self, position_ids: Tensor) -> Tensor:
        """[r / 2]"""
        device = position_ids.device
        frequencies = torch.tensor(self.frequencies, dtype=torch.float32, device=device)
        if self.limit is None:
            return frequencies
        length = position_ids.max() + 1
        if self.long is not None:
            other = torch.tensor(self.long, dtype=torch.float32, device=device)
        else:
            assert self.dynamic is not None
            (theta, factor), dim = self.dynamic, 2 * len(self.frequencies)
            stretch = factor * length.clamp(min=self.limit) / self.limit - (factor - 1)
            exponents = torch.arange(0, dim, 2, device=device).float() / dim
            other = 1.0 / ((theta * stretch ** (dim / (dim - 2))) ** exponents)
        return torch.where(length > self.limit, other, frequencies)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + r/2) of [b, h, s, d] by the angles in cos and sin [b, 1, s, r]."""
    rotated = cos.shape[-1]
    if rotated < x.shape[-1]:
        return torch.cat([apply_rope(x[..., :rotated], cos, sin), x[..., rotated:]], dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def rope_frequencies(dim: int, theta: float) -> list[float]:
    """Unscaled: theta^(-2i / dim) for i = 0 .. dim / 2 - 1."""
    exponents = torch.arange(0, dim, 2, dtype=torch.int64, device="cpu").float() / dim
    return (1.0 / (theta**exponents)).tolist()


def linear_scaled(frequencies: list[float], *, factor: float) -> list[float]:
    """Position interpolation: every rotation `factor` times slower (arXiv 2306.15595)."""
    return [frequency / factor for frequency in frequencies]


def llama3_scaled(
    frequencies: list[float],
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> list[float]:
    """Llama 3.1's scaling: slow rotations are slowed by `factor`, fast ones kept, blended between.

    A rotation is slow when its wavelength exceeds original_max / low_freq_factor positions, and
    fast below original_max / high_freq_factor (The Llama 3 Herd of Models, arXiv 2407.21783).
    """
    scaled = []
    for frequency in frequencies:
        turns = original_max_position_embeddings * frequency / (2 * math.pi)
        blend = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
        blend = min(max(blend, 0.0), 1.0)
        scaled.append((1 - blend) * frequency / factor + blend * frequency)
    return scaled


def yarn_scaled(
    frequencies: list[float],
    *,
    theta: float,
    factor: float,
    beta_fast: float,
    beta_slow: float,
    original_max_position_embeddings: int,
    truncate: bool,
) -> list[float]:
    """YaRN (https://arxiv.org/abs/2309.00071): pairs that turn more than `beta_fast` times in the
    original context are kept, those below `beta_slow` turns slowed by `factor`, a ramp between.
    """
    dim = 2 * len(frequencies)

    def pair_of(turns: float) -> float:
        positions = original_max_position_embeddings / (turns * 2 * math.pi)
        return dim * math.log(positions) / (2 * math.log(theta))

    low, high = pair_of(beta_fast), pair_of(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2).float() - low) / ((high - low) or 0.001)
    slowed = ramp.clamp(0, 1)
    kept = torch.tensor(frequencies)
    return (kept / factor * slowed + kept * (1 - slowed)).tolist()


def yarn_attention_factor(
    factor: float, mscale: float | None = None, mscale_all_dim: float | None = None
) -> float:
    """What YaRN multiplies cos and sin by, where a config does not say it."""

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1)


def longrope_attention_factor(factor: float, original_max_position_embeddings: int) -> float:
    """LongRoPE's (https://arxiv.org/abs/2402.13753), where a config does not say it."""
    if factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(original_max_position_embeddings))


def divided(frequencies: Sequence[float], factors: Sequence[float]) -> list[float]:
    """LongRoPE: every pair slowed by a factor of its own."""
    pairs = zip(frequencies, factors, strict=True)
    return [frequency / factor for frequency, factor in pairs]


def rotary_embedding(
    dim: int, theta: float, max_position_embeddings: int, scaling: Any = None
) -> RotaryEmbedding:
    """
    Args:
        dim: rotated dimensions of a head.
        scaling: None, or what was done to the frequencies: a `models.RopeScaling`.
    """
    frequencies = rope_frequencies(dim, theta)
    if scaling is None:
        return RotaryEmbedding(frequencies)
    original, attention = scaling.original_max_position_embeddings, scaling.attention_factor
    factor = scaling.factor or max_position_embeddings / original
    match scaling.rope_type:
        case "linear":
            return RotaryEmbedding(linear_scaled(frequencies, factor=factor))
        case "dynamic":
            limit = max_position_embeddings
            return RotaryEmbedding(frequencies, limit=limit, dynamic=(theta, factor))
        case "longrope":
            return RotaryEmbedding(
                divided(frequencies, scaling.short_factor),
                scale=attention or longrope_attention_factor(factor, original),
                limit=original,
                long=divided(frequencies, scaling.long_factor),
            )
        case "yarn":
            slowed = yarn_scaled(
                frequencies,
                theta=theta,
                factor=factor,
                beta_fast=scaling.beta_fast,
                beta_slow=scaling.beta_slow,
                original_max_position_embeddings=original,
                truncate=scaling.truncate,
            )
            own = yarn_attention_factor(factor, scaling.mscale, scaling.mscale_all_dim)
            return RotaryEmbedding(slowed, scale=own if attention is None else attention)
        case _:
            bands = {name: getattr(scaling, name) for name in _LLAMA3}
            return RotaryEmbedding(llama3_scaled(frequencies, factor=factor, **bands))
