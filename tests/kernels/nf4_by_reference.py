"""Quantizing and decoding by the reference, for its tests."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_builders.kernels import NF4Format, nf4_reference


def quantize(
    weight: Tensor, block_size: int = 64, scale_block_size: int = 256, scale_format: str = "none"
) -> tuple[tuple[Tensor, Tensor, Tensor], dict]:
    options = {
        "format": NF4Format(
            block_size=block_size, scale_block_size=scale_block_size, scale_format=scale_format
        )
    }
    return nf4_reference.quantize(weight, **options), options


def round_trip(weight: Tensor, **options: int | str) -> Tensor:
    fields, used = quantize(weight, **options)
    return nf4_reference.dequantize(
        fields, shape=weight.shape, **used, dtype=weight.dtype, out_dtype=weight.dtype
    )


def bits_equal(a: Tensor, b: Tensor) -> bool:
    """Unlike torch.equal this tells -0.0 from 0.0."""
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
