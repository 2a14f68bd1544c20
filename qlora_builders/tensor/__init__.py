"""The NF4 tensor type. `nf4_ops` and `nf4_fsdp` fill the dispatch tables on import."""

import torch

from qlora_builders.tensor.nf4_fsdp import (
    gather_nf4,
    held_elements,
    is_nf4_shard,
    shard_nf4,
)
from qlora_builders.tensor.nf4_ops import linear_nf4
from qlora_builders.tensor.nf4_tensor import NF4Tensor, check_nf4_options, to_nf4

torch.serialization.add_safe_globals([NF4Tensor])  # torch.load(weights_only=True)

__all__ = [
    "NF4Tensor",
    "check_nf4_options",
    "gather_nf4",
    "held_elements",
    "is_nf4_shard",
    "linear_nf4",
    "shard_nf4",
    "to_nf4",
]
