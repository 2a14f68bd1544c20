"""The NF4 format: layout, nearest codes, the scale grid, and round trips that change no bit."""

from __future__ import annotations

import struct
from fractions import Fraction
from math import floor
from types import ModuleType

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from qlora_builders import kernels
from qlora_builders.kernels import (
    NF4_CODEBOOK,
    dequantize_nf4,
    field_dtypes,
    field_shapes,
    nf4_reference,
    quantize_nf4,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = ("geometric", "none")

# bitsandbytes' and the paper's 16 values, as decimal literals that round to the float32 meant
CODEBOOK = (
    "-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 "
    "-0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 "
    "0.24611230194568634 0.33791524171829224 0.44070982933044434 0.5626170039176941 "
    "0.7229568362236023 1.0"
)


def quantize(
    weight: Tensor, block_size: int = 64, scale_block_size: int = 256, scale_format: str = "none"
) -> tuple[tuple[Tensor, Tensor, Tensor], dict]:
    options = {
        "block_size": block_size,
        "scale_block_size": scale_block_size,
        "scale_format": scale_format,
    }
    return nf4_reference.quantize_nf4(weight, **options), options


def round_trip(weight: Tensor, **options: int | str) -> Tensor:
    fields, used = quantize(weight, **options)
    return nf4_reference.dequantize_nf4(
        *fields, numel=weight.numel(), **used, dtype=weight.dtype, out_dtype=weight.dtype
    )


def unpack(codes: Tensor, numel: int) -> Tensor:
    return torch.stack([codes >> 4, codes & 15], dim=1).view(-1)[:numel]


def bits_equal(a: Tensor, b: Tensor) -> bool:
    """Unlike torch.equal this tells -0.0 from 0.0."""
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


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
    options = {"block_size": 32, "scale_block_size": 3, "scale_format": scale_format}
    weight = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    fields, _ = quantize(weight, **options)
    blocks = -(-numel // 32)
    groups = 0 if scale_format == "none" else -(-blocks // 3)
    shapes = (((numel + 1) // 2,), (blocks,), (groups, 2))
    assert field_shapes(numel, **options) == shapes
    assert tuple(tuple(field.shape) for field in fields) == shapes
    assert tuple(field.dtype for field in fields) == field_dtypes(scale_format)
    decoded = round_trip(weight, **options)
    assert decoded.shape == weight.shape
    assert numel < 64 or relative_error(weight, decoded) < 0.11


@pytest.mark.parametrize("scale_format", FORMATS)
def test_the_fake_kernels_promise_what_the_real_ones_give(scale_format: str) -> None:
    options = {"block_size": 32, "scale_block_size": 2, "scale_format": scale_format}
    real = quantize_nf4(torch.randn(131), **options)
    fake = quantize_nf4(torch.empty(131, device="meta"), **options)
    for field, promised in zip(real, fake, strict=True):
        assert promised.is_meta
        assert (promised.shape, promised.dtype) == (field.shape, field.dtype)
    out = dequantize_nf4(*fake, numel=131, **options, dtype=torch.float32, out_dtype=torch.float16)
    assert out.is_meta
    assert (tuple(out.shape), out.dtype) == ((131,), torch.float16)


def test_sizes_beyond_32_bits() -> None:
    numel = 3 * 2**31 + 1
    weight = torch.empty(numel, device="meta", dtype=torch.bfloat16)
    fields = quantize_nf4(weight, block_size=64, scale_block_size=256, scale_format="geometric")
    assert fields[0].numel() == 3 * 2**30 + 1
    assert fields[1].numel() == 3 * 2**25 + 1
    assert tuple(fields[2].shape) == (3 * 2**17 + 1, 2)


def test_decoding_matches_the_definition_element_by_element() -> None:
    """A second decoder that only reads the module docstring: Python integers, no tensors."""
    weight = torch.randn(210, generator=torch.Generator().manual_seed(0)) * torch.logspace(
        -4, 4, 210
    )
    fields, options = quantize(weight, 32, 4, "geometric")
    codes, scales, groups = (field.tolist() for field in fields)
    decoded = nf4_reference.dequantize_nf4(
        *fields, numel=210, **options, dtype=torch.float32, out_dtype=torch.float32
    )
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
    weight = torch.randn(4096, generator=torch.Generator().manual_seed(1)).to(dtype)
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


def test_codes_rise_with_the_elements_of_a_block() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(2)).sort(dim=1).values
    fields, _ = quantize(weight)
    codes = unpack(fields[0], weight.numel()).view(16, 64).int()
    assert (codes.diff(dim=1) >= 0).all()


@pytest.mark.parametrize("scale_format", FORMATS)
def test_zero_blocks_decode_to_positive_zeros(scale_format: str) -> None:
    weight = torch.randn(5, 32)
    weight[1], weight[4] = 0.0, -0.0
    decoded = round_trip(
        weight.view(-1), block_size=32, scale_block_size=2, scale_format=scale_format
    ).view(5, 32)
    assert bits_equal(decoded[[1, 4]], torch.zeros(2, 32))
    assert (decoded[[0, 2, 3]] != 0).any(dim=1).all()


# ---- scales -------------------------------------------------------------------------------------


def decode_every_scale_code(lo: float, hi: float, dtype: torch.dtype) -> Tensor:
    """The scales that codes 0 .. 255 of a group stand for: 256 blocks that hold nothing but 1.0."""
    return nf4_reference.dequantize_nf4(
        torch.full((256 * 16,), 0xFF, dtype=torch.uint8),
        torch.arange(256, dtype=torch.uint8),
        torch.tensor([[lo, hi]]),
        numel=256 * 32,
        block_size=32,
        scale_block_size=256,
        scale_format="geometric",
        dtype=dtype,
        out_dtype=torch.float32,
    )[::32]


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
    generator = torch.Generator().manual_seed(3)
    absmax = torch.exp(torch.randn(7, 256, generator=generator) * spread).clamp(max=60_000)
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
    weight = torch.randn(2**20, generator=torch.Generator().manual_seed(4))
    assert relative_error(weight, round_trip(weight, scale_format=scale_format)) <= 0.0921


def test_an_outlier_costs_only_its_own_block() -> None:
    weight = torch.randn(16_384, generator=torch.Generator().manual_seed(5))
    weight[5000] = 500.0
    decoded = round_trip(weight, scale_format="geometric")
    assert decoded[5000] == 500.0
    elsewhere = torch.ones(16_384, dtype=torch.bool).view(-1, 64)
    elsewhere[5000 // 64] = False
    elsewhere = elsewhere.view(-1)
    assert relative_error(weight[elsewhere], decoded[elsewhere]) <= 0.094


# ---- round trips --------------------------------------------------------------------------------


def _block(kind: str, size: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """One block, float64; whatever it is, it is clamped to the dtype's range afterwards."""
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps  # subnormal
    normal = torch.randn(size, generator=generator, dtype=torch.float64)
    exponent = torch.randint(-20, 14, (size,), generator=generator).double()
    match kind:
        case "zero":
            return normal * 0.0
        case "constant":
            return torch.full_like(normal, float(normal[0]))
        case "normal":
            return normal * 0.02
        case "outlier":
            return normal.index_fill(0, torch.tensor([size // 2]), 500.0)
        case "subnormal":
            return (normal * 2.0 ** float(exponent[0] % 5)).round() * smallest
        case "near_subnormal":
            return normal * info.smallest_normal * 2.0 ** float(exponent[0] % 9 - 4)
        case "huge":
            return normal * info.max
        case "powers_of_two":
            return torch.exp2(exponent) * normal.sign()
        case "scaled":
            return normal * torch.exp2(exponent[0])
    raise AssertionError(kind)


KINDS = [
    "zero",
    "constant",
    "normal",
    "outlier",
    "subnormal",
    "near_subnormal",
    "huge",
    "powers_of_two",
    "scaled",
]


@pytest.mark.parametrize("backend", [nf4_reference, kernels], ids=["reference", "by device"])
@hypothesis.settings(max_examples=120, deadline=None, derandomize=True)
@hypothesis.given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=9),
    dtype=st.sampled_from(DTYPES),
    scale_format=st.sampled_from(FORMATS),
    block_size=st.sampled_from([32, 64, 4096]),
    scale_block_size=st.sampled_from([1, 2, 5, 256]),
    missing=st.integers(0, 31),
    seed=st.integers(0, 2**31),
)
def test_round_trip_changes_no_bit(
    backend: ModuleType,
    kinds: list[str],
    dtype: torch.dtype,
    scale_format: str,
    block_size: int,
    scale_block_size: int,
    missing: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.cat([_block(kind, block_size, dtype, generator) for kind in kinds])
    weight = weight[: weight.numel() - missing]
    limit = torch.finfo(dtype).max
    weight = weight.clamp(-limit, limit).to(dtype)

    options = {
        "block_size": block_size,
        "scale_block_size": scale_block_size,
        "scale_format": scale_format,
    }
    first = backend.quantize_nf4(weight, **options)
    fields = first
    decoded = None
    for _ in range(3):
        again = backend.dequantize_nf4(
            *fields, numel=weight.numel(), **options, dtype=dtype, out_dtype=dtype
        )
        assert torch.isfinite(again).all()
        assert decoded is None or bits_equal(decoded, again)
        decoded = again
        fields = backend.quantize_nf4(decoded, **options)
        for before, after in zip(first, fields, strict=True):
            assert torch.equal(before, after)


@pytest.mark.parametrize("backend", [nf4_reference, kernels], ids=["reference", "by device"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("with_huge_block", [False, True])
def test_round_trip_of_every_small_subnormal(
    backend: ModuleType, dtype: torch.dtype, scale_format: str, with_huge_block: bool
) -> None:
    """Blocks of largest magnitude 1 .. 100 units, each with every number of units there is.

    Five units is the hard one: -4 / 5 gets code 1, which decodes to -3, and -3 / 5 gets code 2.
    """
    info = torch.finfo(dtype)
    units = torch.zeros(101, 256, dtype=torch.float64)
    for largest in range(1, 101):
        units[largest, : 2 * largest + 1] = torch.arange(-largest, largest + 1)
    weight = units * (info.smallest_normal * info.eps)
    if with_huge_block:
        weight[0] = info.max  # leaves the others few scale codes
    options = {"block_size": 256, "scale_block_size": 256, "scale_format": scale_format}
    fields = backend.quantize_nf4(weight.to(dtype), **options)
    decode = {"numel": weight.numel(), **options, "dtype": dtype, "out_dtype": dtype}
    decoded = backend.dequantize_nf4(*fields, **decode)
    again = backend.quantize_nf4(decoded, **options)
    for before, after in zip(fields, again, strict=True):
        assert torch.equal(before, after)
    assert bits_equal(decoded, backend.dequantize_nf4(*again, **decode))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_element_of_a_block_decodes_to_the_rounded_scale(dtype: torch.dtype) -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(6)).to(dtype)
    decoded = round_trip(weight.view(-1), scale_format="none").view(64, 64)
    at = weight.abs().argmax(dim=1, keepdim=True)
    assert bits_equal(decoded.gather(1, at), weight.gather(1, at))


@pytest.mark.parametrize("scale_format", FORMATS)
def test_chunking_does_not_show(monkeypatch: pytest.MonkeyPatch, scale_format: str) -> None:
    options = {"block_size": 32, "scale_block_size": 3, "scale_format": scale_format}
    weight = torch.randn(32 * 3 * 9 + 17, generator=torch.Generator().manual_seed(7))
    whole, _ = quantize(weight, **options)
    decoded = round_trip(weight, **options)
    monkeypatch.setattr(nf4_reference, "_CHUNK_ELEMENTS", 1)
    assert nf4_reference._chunk_elements(32, 3) == 32 * 3 * 2  # so there are five chunks
    pieces, _ = quantize(weight, **options)
    for a, b in zip(whole, pieces, strict=True):
        assert torch.equal(a, b)
    assert bits_equal(decoded, round_trip(weight, **options))


def test_out_dtype_is_a_cast_of_the_rounded_weight() -> None:
    fields, options = quantize(torch.randn(100).bfloat16())
    plain = nf4_reference.dequantize_nf4(
        *fields, numel=100, **options, dtype=torch.bfloat16, out_dtype=torch.bfloat16
    )
    for dtype in (torch.float32, torch.float64, torch.float16):
        wide = nf4_reference.dequantize_nf4(
            *fields, numel=100, **options, dtype=torch.bfloat16, out_dtype=dtype
        )
        assert bits_equal(wide, plain.to(dtype))


def test_a_strided_weight_is_read_in_its_logical_order() -> None:
    weight = torch.randn(48, 40)
    fields, _ = quantize(weight.t())
    same, _ = quantize(weight.t().contiguous())
    for a, b in zip(fields, same, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [0, 70, 209])
def test_nan_and_infinity_are_refused_wherever_they_are(bad: float, at: int) -> None:
    weight = torch.zeros(210)
    weight[at] = bad
    with pytest.raises(ValueError, match="NaN or infinite elements; repair the checkpoint"):
        quantize(weight)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_format", ["geometric", "none"])  # bnb: as bitsandbytes, per device
def test_cuda_gives_the_same_bits(dtype: torch.dtype, scale_format: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    generator = torch.Generator().manual_seed(8)
    weight = torch.cat([_block(kind, 4096, dtype, generator) for kind in KINDS])
    limit = torch.finfo(dtype).max
    weight = weight.clamp(-limit, limit).to(dtype)
    on_cpu, options = quantize(weight, scale_format=scale_format)
    on_cuda = quantize_nf4(weight.cuda(), **options)
    for a, b in zip(on_cpu, on_cuda, strict=True):
        assert torch.equal(a, b.cpu())
    decode = {"numel": weight.numel(), **options, "dtype": dtype, "out_dtype": dtype}
    expected = nf4_reference.dequantize_nf4(*on_cpu, **decode)
    assert bits_equal(expected, dequantize_nf4(*on_cuda, **decode).cpu())
