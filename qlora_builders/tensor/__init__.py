"""The NF4 tensor type. `nf4_ops` fills the dispatch tables when this package is imported."""

import torch

from qlora_builders.tensor.nf4_ops import linear_nf4
from qlora_builders.tensor.nf4_tensor import NF4Tensor, check_nf4_options, to_nf4

torch.serialization.add_safe_globals([NF4Tensor])  # torch.load(weights_only=True)

__all__ = ["NF4Tensor", "check_nf4_options", "linear_nf4", "to_nf4"]
