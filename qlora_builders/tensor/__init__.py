"""Quantized weights: one base class, and the types."""

from qlora_builders.kernels import Format, MXFP4Format, NF4Format
from qlora_builders.tensor.mxfp4 import MXFP4Tensor
from qlora_builders.tensor.nf4 import NF4Tensor, linear_nf4, to_nf4
from qlora_builders.tensor.quantized import (
    QUANTIZED_TYPES,
    QuantizedTensor,
    is_quantized,
    linear,
    plain,
    quantize,
    quantized_linear,
)
from qlora_builders.tensor.sharded import format_of, gather

__all__ = [
    "QUANTIZED_TYPES",
    "Format",
    "MXFP4Format",
    "MXFP4Tensor",
    "NF4Format",
    "NF4Tensor",
    "QuantizedTensor",
    "format_of",
    "gather",
    "is_quantized",
    "linear",
    "linear_nf4",
    "plain",
    "quantize",
    "quantized_linear",
    "to_nf4",
]
