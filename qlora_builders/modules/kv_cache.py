"""Keys and values of the positions decoded so far, in buffers of fixed size.

Shapes: b = batch, h = kv heads, s = new positions, m = max_seq_len, d = head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """One preallocated [b, h, m, d] pair per layer; every forward appends s positions to each.

    Raises:
        ValueError: when more than `max_seq_len` positions are written.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        batch_size: int,
        num_kv_heads: int,
        max_seq_len: int,
        head_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (num_layers, 2, batch_size, num_kv_heads, max_seq_len, head_dim)
        self.tensor = torch.zeros(shape, device=device, dtype=dtype)
        self.max_seq_len = max_seq_len
        self.length = 0  # positions that every layer holds

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write [b, h, s, d] at the end of `layer`; returns all its keys and values so far."""
        end = self.length + key.shape[2]
        if end > self.max_seq_len:
            raise ValueError(
                f"the KV cache holds {self.max_seq_len} positions, but {end} are needed; "
                "make it larger (max_seq_len) or generate fewer tokens"
            )
        keys, values = self.tensor[layer]
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, num_positions: int) -> None:
        """Called once per forward, after every layer has written."""
        self.length += num_positions
