"""Whether a tensor holds NaN or infinity, in one pass over it."""

from __future__ import annotations

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Of any floating dtype; `torch.isfinite(...).all()` takes three passes and a copy."""
    return tensor.numel() == 0 or bool(torch.stack(tensor.detach().aminmax()).isfinite().all())
