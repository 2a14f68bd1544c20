"""MXFP4 in plain PyTorch: the definition that faster backends must equal bit for bit.

The 4-bit format of the OCP Microscaling Formats specification 1.0: blocks of 32 elements of the
flattened weight (of a row, where its length is a multiple of 32), each with one scale that is a
power of two, and an element of type E2M1 for every weight: 4.25 bits each.

    element  0, 0.5, 1, 1.5, 2, 3, 4, 6 with a sign: codes 0..7, and 8..15 for the negative ones
    scale    E8M0: code e stands for 2^(e - 127); 255, NaN, is never written

The scale of a block is 2^(floor(log2(largest magnitude)) - 2), so that the largest falls between 4
and 8; what is beyond 6 becomes 6. Elements are rounded to the nearest, ties to the even code. A
block of zeros has scale code 0. This is the specification's own conversion, torchao's
`ScaleCalculationMode.FLOOR`; in blocks below 2^-124, where torchao divides by another scale than
it multiplies with, ours are the nearest codes.

Shapes: n elements, B = ceil(n / 32) blocks; the last one may be short.
    codes   uint8 [ceil(n / 2)]  two a byte, the first element in the low nibble
    scales  uint8 [B]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qlora_builders.kernels.formats import NOT_FINITE, Format, Shape, decoded_matmul

BLOCK_SIZE = 32
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_VALUES = torch.tensor([*_MAGNITUDES, *(-m for m in _MAGNITUDES)], device="cpu")
_MIDPOINTS = (E2M1_VALUES[:7] + E2M1_VALUES[1:8]) / 2
# a tie goes to the even code: from an odd code's upper midpoint on, the next one begins
_UPPER_BOUNDS = torch.where(
    torch.arange(7, device="cpu") % 2 == 0, _MIDPOINTS, torch.nextafter(_MIDPOINTS, -_MIDPOINTS)
)
_LARGEST_EXPONENT = 2  # of E2M1: 4 <= 6 < 8
_BIAS = 127
_CHUNK_ELEMENTS = 1 << 20  # worked on at once: bounds the float32 temporaries


@dataclass(frozen=True, kw_only=True)
class MXFP4Format(Format):
    """It has no options: the specification fixes all."""

    name: ClassVar[str] = "mxfp4"
    tensor_fields: ClassVar[tuple[str, ...]] = ("codes", "scales")

    def field_shapes(self, shape: Sequence[int]) -> tuple[Shape, ...]:
        numel = math.prod(shape)
        return (-(-numel // 2),), (-(-numel // BLOCK_SIZE),)

    def field_dtypes(self) -> tuple[torch.dtype, ...]:
        return torch.uint8, torch.uint8

    def unit(self, shape: Sequence[int]) -> Shape:
        """A block of the flattened weight."""
        return (BLOCK_SIZE,)


def quantize(weight: Tensor, *, format: MXFP4Format) -> tuple[Tensor, Tensor]:
    """(codes, scales) of a weight of any shape.

    Raises:
        ValueError: if the weight has NaN or infinite elements.
    """
    pairs = [_quantize_chunk(chunk) for chunk in weight.reshape(-1).split(_CHUNK_ELEMENTS)]
    codes = torch.cat([codes for codes, _ in pairs])
    return codes[: -(-weight.numel() // 2)], torch.cat([scales for _, scales in pairs])


def _quantize_chunk(flat: Tensor) -> tuple[Tensor, Tensor]:
    missing = -flat.numel() % BLOCK_SIZE
    blocks = torch.nn.functional.pad(flat.float(), (0, missing)).view(-1, BLOCK_SIZE)
    largest = blocks.abs().amax(dim=1)  # NaN if one is
    if not torch.isfinite(largest).all():
        raise ValueError(NOT_FINITE)
    exponent = (largest.view(torch.int32) >> 23) - _LARGEST_EXPONENT  # biased
    scales = exponent.clamp_(min=0).to(torch.uint8)
    scaled = torch.ldexp(blocks, (_BIAS - scales.int())[:, None])
    codes = torch.bucketize(scaled.abs(), _UPPER_BOUNDS.to(flat.device), out_int32=True)
    codes = (codes + 8 * torch.signbit(scaled)).to(torch.uint8).view(-1, 2)
    return codes[:, 0] | codes[:, 1] << 4, scales


def dequantize(
    fields: Sequence[Tensor],
    *,
    format: MXFP4Format,
    shape: Sequence[int],
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    """Decoded to `shape`: rounded to the weight's own `dtype`, cast to `out_dtype`."""
    codes, scales = fields
    numel = math.prod(shape)
    out = torch.empty(numel, dtype=out_dtype, device=codes.device)
    values = E2M1_VALUES.to(codes.device)
    for start in range(0, numel, _CHUNK_ELEMENTS):
        stop = min(start + _CHUNK_ELEMENTS, numel)
        packed = codes[start // 2 : -(-stop // 2)]
        both = values[torch.stack([packed & 15, packed >> 4], dim=1).int()].view(-1)
        exponents = scales[start // BLOCK_SIZE : -(-stop // BLOCK_SIZE)].int() - _BIAS
        each = exponents.repeat_interleave(BLOCK_SIZE)[: stop - start]
        out[start:stop] = torch.ldexp(both[: stop - start], each).to(dtype)
    return out.view(*shape)


matmul = decoded_matmul(dequantize)
