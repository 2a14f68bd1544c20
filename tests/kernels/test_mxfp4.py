"""MXFP4 against the specification's own words, computed in another way: exact fractions."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from qlora_builders.tensor import MXFP4Format, quantize

MAGNITUDES = [Fraction(x) for x in ("0", "1/2", "1", "3/2", "2", "3", "4", "6")]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weights(dtype: torch.dtype, seed: int) -> Tensor:
    """Normal ones, ties, zeros of both signs, a block of each range."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 64, generator=generator) * 10.0 ** (seed - 3)
    weight[1] = torch.randint(-28, 29, (64,), generator=generator) / 4
    weight[2, :32] = 0
    weight[3, ::2] = -0.0
    weight[4, :32] *= 1e-4
    return weight.to(dtype)


def coded_block(block: list[float]) -> tuple[int, list[int]]:
    """(scale code, element codes) of a block that is not all tiny."""
    exact = [Fraction(value) for value in block]
    largest, exponent = max(map(abs, exact)), 0
    if largest == 0:
        exponent = -127
    else:
        while Fraction(2) ** (exponent + 1) <= largest:
            exponent += 1
        while Fraction(2) ** exponent > largest:
            exponent -= 1
        exponent = max(exponent - 2, -127)
    codes = []
    for value, given in zip(exact, block, strict=True):
        ratio = abs(value) / Fraction(2) ** exponent
        distance = [abs(ratio - magnitude) for magnitude in MAGNITUDES]
        nearest = [k for k, d in enumerate(distance) if d == min(distance)]
        code = next(k for k in nearest if len(nearest) == 1 or k % 2 == 0)
        negative = str(given).startswith("-")
        codes.append(code + 8 * negative)
    return exponent + 127, codes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_codes_and_values_are_the_specifications(dtype: torch.dtype, seed: int) -> None:
    weight = weights(dtype, seed)
    quantized = quantize(weight, MXFP4Format())
    codes, scales = quantized.fields
    elements = torch.stack([codes & 15, codes >> 4], dim=1).view(-1, 32)
    values = quantized.dequantize(torch.float64).view(-1, 32)
    for index, block in enumerate(weight.view(-1, 32).tolist()):
        scale, expected = coded_block(block)
        assert scales[index] == scale
        assert elements[index].tolist() == expected
        for value, code in zip(values[index].tolist(), expected, strict=True):
            sign = -1 if code > 7 else 1
            decoded = sign * MAGNITUDES[code % 8] * Fraction(2) ** (scale - 127)
            assert value == float(torch.tensor(float(decoded)).to(dtype))


@pytest.mark.parametrize("numel", [1, 31, 33, 100])
def test_short_blocks(numel: int) -> None:
    weight = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    quantized = quantize(weight, MXFP4Format())
    padded = quantize(torch.nn.functional.pad(weight, (0, -numel % 32)), MXFP4Format())
    assert [field.numel() for field in quantized.fields] == [-(-numel // 2), -(-numel // 32)]
    assert torch.equal(quantized.dequantize(), padded.dequantize()[:numel])
    assert torch.equal(
        quantize(quantized.dequantize(), MXFP4Format()).dequantize(), quantized.dequantize()
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    weight = torch.ones(4, 32)
    weight[2, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize(weight, MXFP4Format())


def test_it_takes_no_options() -> None:
    with pytest.raises(TypeError):
        MXFP4Format(block_size=64)  # type: ignore[call-arg]


def test_bits_per_weight() -> None:
    assert quantize(torch.ones(64, 64), MXFP4Format()).nbytes * 8 / 64**2 == 4.25
