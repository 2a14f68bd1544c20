"""Next-token cross-entropy, as a sum and a count so that any split of a step adds up."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100  # label of a token that is not trained on


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over trained tokens of -log p(token | tokens before), in float32.

    Args:
        logits: [batch, seq, vocab]; position t predicts token t + 1.
        labels: [batch, seq], the token ids with `IGNORE_INDEX` where not trained.
    """
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        labels[:, 1:].flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="sum",
    )


def num_target_tokens(labels: Tensor) -> int:
    """Tokens that `next_token_loss` sums over; the first of a sequence has nothing before it."""
    return int((labels[:, 1:] != IGNORE_INDEX).sum())
