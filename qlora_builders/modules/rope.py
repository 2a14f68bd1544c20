"""Rotary position embedding (https://arxiv.org/abs/2104.09864), half-split as Hugging Face has it.

Shapes: b = batch, s = sequence, h = heads, d = head_dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


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


class RotaryEmbedding(nn.Module):
    """cos and sin tables for given positions.

    The frequencies are Python numbers, not a buffer: building on meta, `to_empty` and
    `Module.to(bfloat16)` cannot lose or round them.

    Args:
        frequencies: radians per position of each of the d / 2 rotated pairs, after scaling.
    """

    def __init__(self, frequencies: list[float]) -> None:
        super().__init__()
        self.frequencies = frequencies

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[b, s] integer positions -> cos, sin [b, 1, s, d] in `dtype`, computed in float32."""
        frequencies = torch.tensor(
            self.frequencies, dtype=torch.float32, device=position_ids.device
        )
        angles = position_ids[:, None, :, None].float() * frequencies  # [b, 1, s, d / 2]
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rope_frequencies(head_dim: int, theta: float) -> list[float]:
    """Unscaled radians per position: theta^(-2i / head_dim) for i = 0 .. head_dim / 2 - 1."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
    return (1.0 / (theta**exponents)).tolist()  # float32 arithmetic, as the checkpoints assume


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + d/2) of [b, h, s, d] by the angles in cos and sin [b, 1, s, d]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
