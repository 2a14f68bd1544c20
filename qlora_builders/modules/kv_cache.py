"""Keys and values of the positions decoded so far, in buffers of fixed size.

Shapes: b = batch, h = kv heads, s = new positions, m = max_seq_len, d = head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class KVCache:
    """One preallocated [b, h, m, d] pair per layer; every forward appends s positions to each.

    After `start_rows` each row has a length of its own, and every forward appends one position. The
    shapes are then the same at every step, which can be compiled, or replayed as a CUDA graph.

    Attributes:
        length: positions that every layer holds; of the longest row.
        rows: [b], the number of positions that each row holds; None while it is `length` for all.

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
        self.length = 0
        self.rows: Tensor | None = None

    def start_rows(self, lengths: Sequence[int]) -> None:
        """From now on row i goes on at position lengths[i]; what it held from there is dropped.

        The host does not follow the rows: at most `max_seq_len - max(lengths)` more positions may
        be written.
        """
        self.rows = torch.tensor(lengths, device=self.tensor.device)
        if self.tensor.is_cuda:
            for tensor in (self.tensor, self.rows):  # CUDA graphs may write to them
                torch._dynamo.mark_static_address(tensor)

    def row_mask(self) -> Tensor:
        """bool [b, 1, 1, m]: what the one new position of each row may attend to."""
        assert self.rows is not None
        index = torch.arange(self.max_seq_len, device=self.rows.device)
        return (index <= self.rows[:, None])[:, None, None]

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write [b, h, s, d] at the end of `layer`; returns all its keys and values so far."""
        keys, values = self.tensor[layer]
        if self.rows is not None:
            batch = torch.arange(len(self.rows), device=self.rows.device)
            keys[batch, :, self.rows] = key[:, :, 0]
            values[batch, :, self.rows] = value[:, :, 0]
            return keys, values  # row_mask hides the rest
        end = self.length + key.shape[2]
        if end > self.max_seq_len:
            raise ValueError(
                f"the KV cache holds {self.max_seq_len} positions, but {end} are needed; "
                "make it larger (max_seq_len) or generate fewer tokens"
            )
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, num_positions: int) -> None:
        """Called once per forward, after every layer has written."""
        if self.rows is not None:
            self.rows += num_positions
        else:
            self.length += num_positions
