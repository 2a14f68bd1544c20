"""Whether a tensor holds NaN or infinity, at the speed of reading it."""

from __future__ import annotations

import torch
from torch import Tensor

# dtype -> integers of the same size, bits of infinity: NaN has larger ones, all else smaller
_BITS = {
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.int32, 0x7F80_0000),
}


def is_finite(tensor: Tensor) -> bool:
    """Of any floating dtype.

    On CPUs by the bits: 0.19 s for 415 MB of bfloat16 on two busy cores, where `torch.aminmax`
    takes 1.0 s and `torch.isfinite(...).all()` 9 s.
    """
    tensor = tensor.detach()
    if tensor.numel() == 0:
        return True
    if not tensor.is_cpu or tensor.dtype not in _BITS:
        return bool(torch.stack(tensor.aminmax()).isfinite().all())
    dtype, infinity = _BITS[tensor.dtype]
    bits = tensor.view(dtype).numpy()
    unsigned = bits.view(f"u{bits.dtype}")  # in which negative numbers are the larger ones
    sign = 1 << (8 * bits.dtype.itemsize - 1)
    return int(bits.max()) < infinity and int(unsigned.max()) < sign + infinity
