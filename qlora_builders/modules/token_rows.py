"""Training a few rows of the embedding: those of new tokens, in memory for those rows alone.

The rows are float32 parameters of their own that stand in for the embedding's, which stays frozen
and as it was. Where head and embedding are one weight, both use the same rows. The names of the
module and its parameter are PEFT's.

Shapes: b = batch, s = sequence, n = trained tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_builders.modules.linear import Linear
from qlora_builders.tensor import linear


class TokenRows(nn.Module):
    """The trained rows: `trainable_tokens_delta` [n, hidden], whole ones in spite of its name."""

    token_ids: Tensor  # [n]
    row_of: Tensor  # [vocab]: the row of a token, n for those that do not train

    def __init__(
        self, tokens: Sequence[int], vocab_size: int, dim: int, device: torch.device | str | None
    ) -> None:
        super().__init__()
        self.tokens = tuple(tokens)
        self.vocab_size = vocab_size
        rows = torch.zeros(len(self.tokens), dim, device=device, dtype=torch.float32)
        self.trainable_tokens_delta = nn.Parameter(rows)
        for name in ("token_ids", "row_of"):
            self.register_buffer(name, None, persistent=False)
        self._index(rows.device)

    def _index(self, device: torch.device) -> None:
        self.token_ids = torch.tensor(self.tokens, device=device)
        row_of = torch.full((self.vocab_size,), len(self.tokens), device=device)
        row_of[self.token_ids] = torch.arange(len(self.tokens), device=device)
        self.row_of = row_of

    @torch.no_grad()
    def init_from(self, weight: Tensor) -> None:
        """Start as the rows of an embedding's weight [vocab, hidden]."""
        self._index(weight.device)
        rows = weight[self.token_ids].float()
        self.trainable_tokens_delta = nn.Parameter(rows)

    def put_into(self, weight: Tensor) -> Tensor:
        """A copy of a weight [vocab, hidden] with the trained rows in place of its own."""
        return weight.index_copy(0, self.token_ids, self.trainable_tokens_delta.to(weight))


class TokenEmbedding(nn.Embedding):
    """`nn.Embedding` with a frozen weight and some rows that train. [b, s] -> [b, s, hidden]"""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        tokens: Sequence[int],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.weight.requires_grad_(False)
        self.token_adapter = TokenRows(tokens, num_embeddings, embedding_dim, device)
        if not self.weight.is_meta:
            self.token_adapter.init_from(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        own = super().forward(input)  # [b, s, hidden]
        row = self.token_adapter.row_of[input]  # [b, s]
        rows = self.token_adapter.trainable_tokens_delta
        trains = row < len(rows)
        trained = F.embedding(row.clamp(max=len(rows) - 1), rows)  # [b, s, hidden]
        return torch.where(trains[..., None], trained.to(own.dtype), own)


class TokenHead(Linear):
    """A head tied to a `TokenEmbedding`: the logits of the trained tokens are of their rows."""

    token_adapter: TokenRows

    def forward(self, input: Tensor) -> Tensor:
        logits = linear(input, self.weight, self.bias)  # [..., vocab]
        own = linear(input, self.token_adapter.trainable_tokens_delta, None)  # [..., n]
        return logits.index_copy_(-1, self.token_adapter.token_ids, own)
