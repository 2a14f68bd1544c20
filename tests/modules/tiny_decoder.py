"""Token ids for the tiny model of `archs.py`."""

from __future__ import annotations

import torch
from archs import TINY, tiny_model
from torch import Tensor

VOCAB: int = TINY["vocab_size"]
build = tiny_model


def ids(batch: int = 2, seq: int = 12, seed: int = 1) -> Tensor:
    return torch.randint(VOCAB, (batch, seq), generator=torch.Generator().manual_seed(seed))
