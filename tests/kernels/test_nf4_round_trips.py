"""NF4 weights that are decoded and quantized again: no bit changes, on no backend."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from nf4_cases import DTYPES, all_same_bits, decode, quantize, randn, round_trip, same_bits
from torch import Tensor

from qlora_builders.kernels import NF4, NF4Format, nf4_reference

FORMATS = ("geometric", "none")
KINDS = (
    *("zero", "constant", "normal", "outlier", "subnormal", "near_subnormal", "huge"),
    *("powers_of_two", "scaled"),
)


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


def _blocks(
    kinds: Sequence[str], size: int, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    blocks = torch.cat([_block(kind, size, dtype, generator) for kind in kinds])
    limit = torch.finfo(dtype).max
    return blocks.clamp(-limit, limit).to(dtype)


@pytest.mark.parametrize("backend", [nf4_reference, NF4], ids=["reference", "by device"])
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
    weight = _blocks(kinds, block_size, dtype, generator)
    weight = weight[: weight.numel() - missing]
    format = NF4Format(
        block_size=block_size, scale_block_size=scale_block_size, scale_format=scale_format
    )
    fields = first = backend.quantize(weight, format=format)
    decoded = None
    for _ in range(3):
        again = decode(backend, fields, weight, format)
        assert torch.isfinite(again).all()
        assert decoded is None or same_bits(decoded, again)
        decoded = again
        fields = backend.quantize(decoded, format=format)
        assert all_same_bits(first, fields)


@pytest.mark.parametrize("backend", [nf4_reference, NF4], ids=["reference", "by device"])
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
    units *= info.smallest_normal * info.eps
    if with_huge_block:
        units[0] = info.max  # leaves the others few scale codes
    weight, format = units.to(dtype), NF4Format(block_size=256, scale_format=scale_format)
    fields = backend.quantize(weight, format=format)
    decoded = decode(backend, fields, weight, format)
    again = backend.quantize(decoded, format=format)
    assert all_same_bits(fields, again)
    assert same_bits(decoded, decode(backend, again, weight, format))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_element_of_a_block_decodes_to_the_rounded_scale(dtype: torch.dtype) -> None:
    weight = randn(64, 64, dtype=dtype, seed=6)
    decoded = round_trip(weight, scale_format="none")
    at = weight.abs().argmax(dim=1, keepdim=True)
    assert same_bits(decoded.gather(1, at), weight.gather(1, at))


@pytest.mark.parametrize("scale_format", FORMATS)
def test_chunking_does_not_show(monkeypatch: pytest.MonkeyPatch, scale_format: str) -> None:
    options = {"block_size": 32, "scale_block_size": 3, "scale_format": scale_format}
    weight = randn(32 * 3 * 9 + 17, seed=7)
    whole, format = quantize(weight, **options)
    decoded = round_trip(weight, **options)
    monkeypatch.setattr(nf4_reference, "_CHUNK_ELEMENTS", 1)
    assert nf4_reference._chunk_elements(format) == 32 * 3  # so there are ten chunks
    assert all_same_bits(whole, quantize(weight, **options)[0])
    assert same_bits(decoded, round_trip(weight, **options))


def test_out_dtype_is_a_cast_of_the_rounded_weight() -> None:
    weight = randn(100, dtype=torch.bfloat16)
    fields, format = quantize(weight)
    plain = decode(nf4_reference, fields, weight, format)
    for dtype in (torch.float32, torch.float64, torch.float16):
        wide = decode(nf4_reference, fields, weight, format, dtype)
        assert same_bits(wide, plain.to(dtype))


def test_a_strided_weight_is_read_in_its_logical_order() -> None:
    weight = torch.randn(48, 40)
    assert all_same_bits(quantize(weight.t())[0], quantize(weight.t().contiguous())[0])


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
    weight = _blocks(KINDS, 4096, dtype, generator)
    on_cpu, format = quantize(weight, scale_format=scale_format)
    on_cuda = NF4.quantize(weight.cuda(), format=format)
    assert all_same_bits(on_cpu, on_cuda)
    expected = decode(nf4_reference, on_cpu, weight, format)
    assert same_bits(expected, decode(NF4, on_cuda, weight, format))
