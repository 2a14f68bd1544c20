"""The NF4 format: layout, nearest codes, the scale grid."""

from __future__ import annotations

import struct
from fractions import Fraction
from math import floor

import pytest
import torch
from nf4_cases import DTYPES, decode, quantize, randn, round_trip, same_bits
from torch import Tensor

from qlora_builders.kernels import NF4, NF4_CODEBOOK, NF4Format, nf4_reference

FORMATS = ("geometric", "none")

# bitsandbytes' and the paper's 16 values, as decimal literals that round to the float32 meant
CODEBOOK = (
    "-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 "
    "-0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 "
    "0.24611230194568634 0.33791524171829224 0.44070982933044434 0.5626170039176941 "
    "0.7229568362236023 1.0"
)


def unpack(codes: Tensor, numel: int) -> Tensor:
    return torch.stack([codes >> 4, codes & 15], dim=1).view(-1)[:numel]


def relative_error(weight: Tensor, decoded: Tensor) -> float:
    return float((weight - decoded).norm() / weight.norm())


# ---- layout -------------------------------------------------------------------------------------


def test_codebook_is_exact() -> None:
    assert NF4_CODEBOOK.dtype == torch.float32
    assert NF4_CODEBOOK.tolist() == [float(value) for value in CODEBOOK.split()]
    assert NF4_CODEBOOK.unique().numel() == 16


def test_codebook_values_keep_their_codes_and_the_first_is_in_the_high_nibble() -> None:
    fields, _ = quantize(torch.cat([NF4_CODEBOOK, NF4_CODEBOOK.flip(0)]), block_size=32)
    rising = [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF]
    falling = [0xFE, 0xDC, 0xBA, 0x98, 0x76, 0x54, 0x32, 0x10]
    assert fields[0].tolist() == rising + falling
    assert fields[1].tolist() == [1.0]


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("numel", [0, 1, 2, 31, 32, 33, 64, 65, 127, 129, 4095, 4097])
def test_sizes_and_tails(numel: int, scale_format: str) -> None:
    weight = randn(numel, seed=numel)
    options = {"block_size": 32, "scale_block_size": 3, "scale_format": scale_format}
    fields, format = quantize(weight, **options)
    blocks = -(-numel // 32)
    groups = 0 if scale_format == "none" else -(-blocks // 3)
    shapes = (((numel + 1) // 2,), (blocks,), (groups, 2))
    assert format.field_shapes((numel,)) == shapes
    assert tuple(tuple(field.shape) for field in fields) == shapes
    assert tuple(field.dtype for field in fields) == format.field_dtypes()
    decoded = round_trip(weight, **options)
    assert decoded.shape == weight.shape
    assert numel < 64 or relative_error(weight, decoded) < 0.11


@pytest.mark.parametrize("scale_format", FORMATS)
def test_the_fake_kernels_promise_what_the_real_ones_give(scale_format: str) -> None:
    format = NF4Format(block_size=32, scale_block_size=2, scale_format=scale_format)
    real = NF4.quantize(torch.randn(131), format=format)
    fake = NF4.quantize(torch.empty(131, device="meta"), format=format)
    for field, promised in zip(real, fake, strict=True):
        assert promised.is_meta
        assert (promised.shape, promised.dtype) == (field.shape, field.dtype)
    out = decode(NF4, fake, torch.empty(131), format, torch.float16)
    assert out.is_meta
    assert (tuple(out.shape), out.dtype) == ((131,), torch.float16)


def test_sizes_beyond_32_bits() -> None:
    numel = 3 * 2**31 + 1
    weight = torch.empty(numel, device="meta", dtype=torch.bfloat16)
    fields = NF4.quantize(weight, format=NF4Format())
    assert fields[0].numel() == 3 * 2**30 + 1
    assert fields[1].numel() == 3 * 2**25 + 1
    assert tuple(fields[2].shape) == (3 * 2**17 + 1, 2)


def test_decoding_matches_the_definition_element_by_element() -> None:
    """A second decoder that only reads the module docstring: Python integers, no tensors."""
    weight = randn(210) * torch.logspace(-4, 4, 210)
    options = {"block_size": 32, "scale_block_size": 4, "scale_format": "geometric"}
    fields, format = quantize(weight, **options)
    codes, scales, groups = (field.tolist() for field in fields)
    decoded = decode(nf4_reference, fields, weight, format)
    for index, value in enumerate(decoded.tolist()):
        code = codes[index // 2] >> 4 if index % 2 == 0 else codes[index // 2] & 15
        block = index // 32
        lo, hi = (_float_bits(bound) for bound in groups[block // 4])
        scale = _bits_float(grid_bits(scales[block], lo, hi))
        assert value == float(torch.tensor(NF4_CODEBOOK[code].item() * scale, dtype=torch.float32))


def _float_bits(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


def _bits_float(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def grid_bits(code: int, lo: int, hi: int) -> int:
    """The docstring's formula in exact rational arithmetic."""
    return lo + floor(Fraction((code - 1) * (hi - lo), 254) + Fraction(1, 2))


# ---- element codes ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_is_the_nearest(dtype: torch.dtype) -> None:
    weight = randn(4096, dtype=dtype, seed=1)
    fields, _ = quantize(weight)
    normalized = weight.view(-1, 64).double() / fields[1][:, None].double()
    distance = (normalized[..., None] - NF4_CODEBOOK.double()).abs()  # [B, 64, 16]
    chosen = distance.gather(-1, unpack(fields[0], 4096).long().view(-1, 64, 1)).squeeze(-1)
    # float32 division and midpoints are rounded, hence 2^-24 instead of 0
    assert (chosen - distance.amin(-1)).max() <= 2**-24


def test_a_tie_takes_the_lower_code() -> None:
    midpoints = (NF4_CODEBOOK[:-1] + NF4_CODEBOOK[1:]) / 2
    weight = torch.cat([torch.ones(1), midpoints, torch.zeros(16)])
    fields, _ = quantize(weight, block_size=32)
    assert unpack(fields[0], 32).tolist()[1:16] == list(range(15))


@pytest.mark.parametrize("scale_format", FORMATS)
def test_zero_blocks_decode_to_positive_zeros(scale_format: str) -> None:
    weight = torch.randn(5, 32)
    weight[1], weight[4] = 0.0, -0.0
    options = {"block_size": 32, "scale_block_size": 2, "scale_format": scale_format}
    decoded = round_trip(weight, **options)
    assert same_bits(decoded[[1, 4]], torch.zeros(2, 32))
    assert (decoded[[0, 2, 3]] != 0).any(dim=1).all()


# ---- scales -------------------------------------------------------------------------------------


def decode_every_scale_code(lo: float, hi: float, dtype: torch.dtype) -> Tensor:
    """The scales that codes 0 .. 255 of a group stand for: 256 blocks that hold nothing but 1.0."""
    codes = torch.full((256 * 16,), 0xFF, dtype=torch.uint8)
    fields = codes, torch.arange(256, dtype=torch.uint8), torch.tensor([[lo, hi]])
    like, format = torch.empty(256 * 32, dtype=dtype), NF4Format(block_size=32)
    return decode(nf4_reference, fields, like, format, torch.float32)[::32]


@pytest.mark.parametrize("bounds", [(1e-3, 3.0), (1.0, 1.0), (1.0, 1.0000001), (1e-38, 3e38)])
def test_the_grid_keeps_both_ends_and_rises(bounds: tuple[float, float]) -> None:
    lo, hi = torch.tensor(bounds).tolist()
    grid = decode_every_scale_code(lo, hi, torch.float32)
    assert grid[0] == 0
    assert (grid[1].item(), grid[255].item()) == (lo, hi)
    assert (grid[1:].diff() >= 0).all()
    for code in range(1, 256):
        expected = grid_bits(code, _float_bits(lo), _float_bits(hi))
        assert grid[code].item() == _bits_float(expected)


def check_scale_codes(absmax: Tensor, dtype: torch.dtype) -> None:
    """Compare with a search over all 255 codes of every group; absmax is [groups, 256]."""
    weight = torch.zeros(absmax.numel(), 32, dtype=dtype)
    weight[:, 9] = -absmax.view(-1).to(dtype)
    (_, codes, groups), _ = quantize(weight, block_size=32, scale_format="geometric")
    absmax = absmax.to(dtype).float()
    codes = codes.view(absmax.shape).int()
    for scales, got, group in zip(absmax, codes, groups, strict=True):
        lo, hi = group.tolist()
        assert (lo, hi) == (scales[scales > 0].min(), scales.max())
        grid = decode_every_scale_code(lo, hi, dtype)[1:]
        nearest = (scales[:, None] - grid).abs().argmin(dim=1)
        lowest = (grid == grid[nearest][:, None]).int().argmax(dim=1) + 1  # of that rounded value
        assert torch.equal(got, torch.where(scales > 0, lowest, 0).int())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [1e-7, 1e-2, 1.0, 6.0])
def test_scale_codes_are_the_nearest_rounded_ones(dtype: torch.dtype, spread: float) -> None:
    absmax = torch.exp(randn(7, 256, seed=3) * spread).clamp(max=60_000)
    absmax[0, ::7] = 0.0
    check_scale_codes(absmax, dtype)


def test_scale_codes_where_codes_of_equal_and_of_skipped_value_meet() -> None:
    """float16 subnormals: small scales have several codes each, larger ones share theirs."""
    smallest = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps
    absmax = (torch.arange(256) * smallest).repeat(14, 1)
    absmax[:, -1] = 2.0 ** torch.arange(2, 16)
    check_scale_codes(absmax, torch.float16)


# ---- accuracy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_format", FORMATS)
def test_error_on_normal_weights(scale_format: str) -> None:
    weight = randn(2**20, seed=4)
    assert relative_error(weight, round_trip(weight, scale_format=scale_format)) <= 0.0921


def test_an_outlier_costs_only_its_own_block() -> None:
    weight = randn(256, 64, seed=5)
    weight[78, 8] = 500.0
    decoded = round_trip(weight, scale_format="geometric")
    assert decoded[78, 8] == 500.0
    elsewhere = torch.arange(256) != 78
    assert relative_error(weight[elsewhere], decoded[elsewhere]) <= 0.094
