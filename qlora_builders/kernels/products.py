"""Products with a plain weight, by the library that is faster.

PyTorch multiplies float32 on CPUs with MKL, which runs its best code on Intel's processors only.
On an AMD EPYC (Zen 4, AVX-512) oneDNN, which PyTorch also ships, takes 0.81 to 0.94 of its CPU time
from 64 rows on; with fewer, and everywhere else, PyTorch's choice stands. The choice depends on the
machine and the shape alone, so a resumed run repeats the bits of the first.

Shapes: n = rows of the input, in = in_features, out = out_features.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

_FEW_ROWS = 64


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[n, in] @ [out, in].T + [out]"""
    if _onednn_is_faster(input):
        return _onednn_linear(input, weight, bias)
    return F.linear(input, weight, bias)


def matmul(input: Tensor, weight: Tensor) -> Tensor:
    """[n, out] @ [out, in]"""
    if _onednn_is_faster(input):
        return _onednn_linear(input, weight.t(), None)
    return input @ weight


def linear_out(input: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor) -> None:
    """`linear` into memory that is there, rows of which may lie apart. out: [n, out]"""
    if _onednn_is_faster(input):
        out.copy_(_onednn_linear(input, weight, bias))
    elif bias is not None:
        torch.addmm(bias, input, weight.t(), out=out)
    else:
        torch.mm(input, weight.t(), out=out)


def add_matmul(input: Tensor, weight: Tensor, *, out: Tensor) -> None:
    """out [n, in] += `matmul`, in out's dtype"""
    if input.dtype != out.dtype or _onednn_is_faster(input):
        out.add_(matmul(input, weight))
    else:
        torch.addmm(out, input, weight, out=out)


def _onednn_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return product


def _onednn_is_faster(input: Tensor) -> bool:
    return (
        input.is_cpu
        and input.dtype == torch.float32
        and len(input) >= _FEW_ROWS
        and _mkl_is_slow()
        and bool(torch.backends.mkldnn.enabled)  # the user's switch
    )


@functools.cache
def _mkl_is_slow() -> bool:
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False
