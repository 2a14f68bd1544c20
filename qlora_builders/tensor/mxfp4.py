"""MXFP4, the microscaling 4-bit type; `kernels/mxfp4_reference.py` defines what fields mean."""

from __future__ import annotations

from torch import Tensor

from qlora_builders.kernels import MXFP4, MXFP4Format
from qlora_builders.tensor.quantized import QuantizedTensor


class MXFP4Tensor(QuantizedTensor):
    """A weight in MXFP4; n elements. Build one with `quantize(weight, MXFP4Format())`.

    | field  | dtype                   | shape           |
    |--------|-------------------------|-----------------|
    | codes  | uint8, two codes a byte | [ceil(n / 2)]   |
    | scales | uint8, exponents        | [ceil(n / 32)]  |
    """

    kernels = MXFP4

    format: MXFP4Format
    codes: Tensor
    scales: Tensor
