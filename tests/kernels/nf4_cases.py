"""Weights that kernels get wrong, and the backends that must not."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qlora_builders.kernels import NF4Format, nf4_reference
from qlora_builders.tensor import NF4Tensor, to_nf4

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = ("geometric", "none", "bnb")


def adversarial(dtype: torch.dtype, n: int = 5000) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(n, generator=generator)
    tiny, largest = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    outlier = normal.clone()
    outlier[5] = 500
    zeros = normal.clone()
    zeros[:1000] = 0
    powers = 2.0 ** torch.randint(-14, 15, (n,), generator=generator)
    scales = torch.logspace(-30, 30, n).clamp(tiny / 8, largest / 8)
    weights = {
        "normal": normal,
        "outlier": outlier,
        "zero blocks": zeros,
        "all zero": torch.zeros(n),
        "constant": torch.full((n,), -0.3),
        "powers of two": powers,
        "mixed scales": normal * scales,
        "subnormal": normal * tiny / 4,
        "around the smallest normal": normal * tiny * 16,
        "huge": torch.rand(n, generator=generator) * largest - largest / 2,
    }
    return {name: w.to(dtype).nan_to_num(0, largest, -largest) for name, w in weights.items()}


def every_case(dtype: torch.dtype, scale_format: str, numel: int) -> Tensor:
    """`numel` elements of each, one after another, and a tail."""
    weights = adversarial(dtype)
    if scale_format == "bnb":
        del weights["huge"]  # refused where its mean overflows
    return torch.cat([*(weight[:numel] for weight in weights.values()), weights["normal"][:17]])


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Unlike torch.equal this tells -0.0 from 0.0; on any device."""
    return a.dtype == b.dtype and torch.equal(a.cpu().view(torch.uint8), b.cpu().view(torch.uint8))


def all_same_bits(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return len(a) == len(b) and all(map(same_bits, a, b))


def quantize(weight: Tensor, **options: Any) -> tuple[tuple[Tensor, Tensor, Tensor], NF4Format]:
    """By the reference, with the format used."""
    format = NF4Format(**{"scale_format": "none"} | options)
    return nf4_reference.quantize(weight, format=format), format


def decode(
    backend: ModuleType,
    fields: Any,
    like: Tensor,
    format: NF4Format,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Fields of a weight of the shape and dtype of `like`."""
    shape, dtype = like.shape, like.dtype
    return backend.dequantize(
        fields, format=format, shape=shape, dtype=dtype, out_dtype=out_dtype or dtype
    )


def round_trip(weight: Tensor, **options: Any) -> Tensor:
    fields, format = quantize(weight, **options)
    return decode(nf4_reference, fields, weight, format)


def far_away(part: NF4Tensor, first: int, device: str = "cpu") -> tuple[Tensor, ...]:
    """Fields of a weight that ends with `part`, whose elements begin at `first`.

    Only the pages that are written here ever exist on a CPU.
    """
    units = (2, 64, 64 * 256)  # elements for one of each field
    made = []
    for field, elements in zip(part.fields, units, strict=True):
        whole = torch.empty(
            first // elements + len(field), *field.shape[1:], dtype=field.dtype, device=device
        )
        whole[first // elements :] = field
        made.append(whole)
    return tuple(made)


def quantized(*shape: int, dtype: torch.dtype = torch.float32, **options: Any) -> NF4Tensor:
    return to_nf4(randn(*shape, dtype=dtype), **options)
