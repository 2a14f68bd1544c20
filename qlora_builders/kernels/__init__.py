"""Kernels of quantized weights on plain tensors; which backend runs is chosen here, by device.

`nf4_reference` defines the result for NF4; `nf4_cpu` and `nf4_triton` give it faster. MXFP4 has its
reference alone so far.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType

import torch

from qlora_builders.kernels import mxfp4_reference, nf4_cpu, nf4_reference
from qlora_builders.kernels.formats import MATMUL_OPS, WEIGHT_DTYPES, Format, Kernels
from qlora_builders.kernels.mxfp4_reference import MXFP4Format
from qlora_builders.kernels.nf4_reference import NF4_CODEBOOK, NF4Format

__all__ = [
    "MATMUL_OPS",
    "MXFP4",
    "NF4",
    "NF4_CODEBOOK",
    "WEIGHT_DTYPES",
    "Format",
    "Kernels",
    "MXFP4Format",
    "NF4Format",
]


def _nf4_backend(device: torch.device, format: NF4Format, *dtypes: torch.dtype) -> ModuleType:
    """The fastest that takes this format and these dtypes on this device."""
    compiled = nf4_cpu if device.type == "cpu" else _triton_backend()
    if compiled is not None and compiled.supports(format, *dtypes):
        return compiled
    return nf4_reference


@functools.cache
def _triton_backend() -> ModuleType | None:
    try:
        return importlib.import_module("qlora_builders.kernels.nf4_triton")
    except ImportError as error:
        warnings.warn(
            "Triton is not installed, so the slow PyTorch reference serves NF4 weights on this "
            f"GPU: pip install triton. {error}",
            stacklevel=2,
        )
        return None


NF4 = Kernels(NF4Format, _nf4_backend)
MXFP4 = Kernels(MXFP4Format, lambda *_: mxfp4_reference)
