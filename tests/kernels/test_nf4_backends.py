"""C on CPUs and Triton, interpreted or on a GPU, equal the reference bit for bit."""

from __future__ import annotations

import importlib
import os
import shutil
from types import ModuleType
from typing import Any

import pytest
import torch
from nf4_cases import (
    DTYPES,
    FORMATS,
    adversarial,
    all_same_bits,
    decode,
    every_case,
    far_away,
    quantized,
    randn,
    same_bits,
)
from torch import Tensor

from qlora_builders.kernels import NF4Format, nf4_cpu, nf4_reference, products
from qlora_builders.tensor import linear_nf4, to_nf4

pytestmark = [
    # the interpreter computes with numpy, which remarks on what IEEE arithmetic is meant to do
    pytest.mark.filterwarnings("ignore:(overflow|divide by zero|invalid value) encountered"),
]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
by_format = pytest.mark.parametrize("scale_format", FORMATS)


@pytest.fixture(params=["c", "triton", pytest.param("gpu", marks=pytest.mark.gpu)])
def name(request: pytest.FixtureRequest) -> str:
    if request.param == "c" and shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("needs a C compiler")
    if request.param == "triton" and torch.cuda.is_available():
        pytest.skip("with a GPU the kernels are compiled, not interpreted")
    return str(request.param)


@pytest.fixture
def backend(name: str) -> ModuleType:
    if name == "c":
        return nf4_cpu
    pytest.importorskip("triton")
    return importlib.import_module("qlora_builders.kernels.nf4_triton")


@pytest.fixture
def device(name: str) -> str:
    return "cuda" if name == "gpu" else "cpu"


# ---- quantizing and decoding --------------------------------------------------------------------


@by_dtype
@by_format
@pytest.mark.parametrize(
    ("block_size", "scale_block_size", "numel"),
    [(64, 3, 448), (32, 256, 352), (1024, 2, 1025), (4096, 1, 410)],
)
def test_equal_the_reference(
    backend: ModuleType,
    device: str,
    dtype: torch.dtype,
    scale_format: str,
    block_size: int,
    scale_block_size: int,
    numel: int,
) -> None:
    assert backend.supports(NF4Format(scale_format=scale_format), dtype)
    weight = every_case(dtype, scale_format, 5000 if backend is nf4_cpu else numel)
    format = NF4Format(
        block_size=block_size, scale_block_size=scale_block_size, scale_format=scale_format
    )
    fields = nf4_reference.quantize(weight.to(device), format=format)
    assert all_same_bits(backend.quantize(weight.to(device), format=format), fields)
    for out_dtype in DTYPES:
        want = decode(nf4_reference, [f.cpu() for f in fields], weight, format, out_dtype)
        assert same_bits(decode(backend, fields, weight, format, out_dtype), want), out_dtype


@by_dtype
@pytest.mark.parametrize("scale_format", ["geometric", "none"])
def test_scale_search_equals_the_reference(
    backend: ModuleType, device: str, dtype: torch.dtype, scale_format: str
) -> None:
    weight = every_case(dtype, scale_format, 5000 if backend is nf4_cpu else 192)
    format = NF4Format(scale_block_size=5, scale_format=scale_format, scale_search=True)
    got = backend.quantize(weight.to(device), format=format)
    assert all_same_bits(got, nf4_reference.quantize(weight, format=format))


@pytest.mark.parametrize("numel", [0, 1, 2, 63, 64, 65, 4097])
def test_odd_sizes_and_empty_weights(backend: ModuleType, device: str, numel: int) -> None:
    weight = adversarial(torch.bfloat16)["mixed scales"][:numel]
    got = backend.quantize(weight.to(device), format=NF4Format())
    assert all_same_bits(got, nf4_reference.quantize(weight, format=NF4Format()))


def test_large_groups(backend: ModuleType, device: str) -> None:
    weight, format = randn(5000 * 32), NF4Format(block_size=32, scale_block_size=5000)
    got = backend.quantize(weight.to(device), format=format)
    assert all_same_bits(got, nf4_reference.quantize(weight, format=format))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@by_dtype
def test_what_is_not_finite_is_refused(
    backend: ModuleType, device: str, dtype: torch.dtype, value: float
) -> None:
    weight = torch.ones(300, dtype=dtype, device=device)
    weight[299] = value
    with pytest.raises(ValueError, match="the weight has NaN or infinite elements"):
        backend.quantize(weight, format=NF4Format(scale_block_size=2))


def test_bnb_refuses_a_mean_scale_that_overflows(backend: ModuleType, device: str) -> None:
    weight = torch.full((640,), torch.finfo(torch.float32).max, device=device)
    for each in (backend, nf4_reference):
        with pytest.raises(ValueError, match="too large for scale_format 'bnb'"):
            each.quantize(weight, format=NF4Format(scale_format="bnb"))


@by_format
def test_a_range_is_part_of_the_whole(backend: ModuleType, device: str, scale_format: str) -> None:
    q = to_nf4(adversarial(torch.bfloat16)["normal"], scale_block_size=3, scale_format=scale_format)
    fields, whole = [field.to(device) for field in q.fields], q.dequantize(torch.float32)
    for start, stop in [(0, 64), (64, 128), (192, 1000), (4992, 5000), (0, 5000)]:
        out = torch.empty(stop - start, device=device)
        backend.dequantize_range_(out, fields, start=start, format=q.format, dtype=q.dtype)
        assert torch.equal(out.cpu(), whole[start:stop])


@by_format
def test_elements_beyond_two_to_the_31_are_found(
    backend: ModuleType, device: str, scale_format: str
) -> None:
    part, first = quantized(2 * 256 * 64, scale_format=scale_format), 3 * 2**30
    fields = far_away(part, first, device)
    out = torch.empty(part.numel(), device=device)
    backend.dequantize_range_(out, fields, start=first, dtype=part.dtype, format=part.format)
    assert torch.equal(out.cpu(), part.dequantize())


# ---- products -----------------------------------------------------------------------------------


def assert_rounded_product(have: Tensor, input: Tensor, dense: Tensor, bias: Tensor | None) -> None:
    """Against the float64 product with weights `dense`, one rounding of each and of the result.

    Roundings of the weights are independent: four standard deviations of their sum.
    """
    x, w = input.double(), dense.double()
    want = x @ w.t() if bias is None else x @ w.t() + bias.double()
    unit = max(torch.finfo(have.dtype).eps / 2, 2**-22)  # float32 adds up in another order
    bound = 4 * unit * (x.square() @ w.square().t()).sqrt() + 1.01 * unit * want.abs()
    assert ((have.cpu().double() - want).abs() <= bound).all()


@by_dtype
@by_format
@pytest.mark.parametrize("shape", [(37, 128), (5, 192), (3, 1088)], ids=str)
def test_products_with_a_few_rows(
    backend: ModuleType,
    device: str,
    dtype: torch.dtype,
    scale_format: str,
    shape: tuple[int, int],
) -> None:
    """Without a decoded weight, against a float64 product with it."""
    plain = randn(*shape, dtype=dtype)
    plain[0, :100] = 0
    weight = to_nf4(plain, scale_block_size=5, scale_format=scale_format)
    fields = [f.to(device) for f in weight.fields]
    options = {"format": weight.format, "dtype": dtype, "shape": shape, "transposed": True}
    input_dtypes = DTYPES if backend is nf4_cpu else (dtype,)
    for input_dtype, rows in [(d, r) for d in input_dtypes for r in (1, 2, 3, 4, 8)]:
        input = randn(rows, shape[1], dtype=input_dtype, seed=rows)
        for bias in (None, randn(shape[0], dtype=input_dtype, seed=9)):
            moved = None if bias is None else bias.to(device)
            have = backend.matmul(input.to(device), fields, moved, **options)
            assert have.dtype == input_dtype
            assert_rounded_product(have, input, weight.dequantize(input_dtype), bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(37, 52), (64, 100), (16, 128), (5, 129)], ids=str)
def test_products_by_tiles(
    backend: ModuleType,
    device: str,
    dtype: torch.dtype,
    shape: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One tile gives the same bits; many tiles the same sums in another order."""
    weight = quantized(*shape, dtype=torch.bfloat16, block_size=32)
    fields, bias = [f.to(device) for f in weight.fields], randn(shape[0], dtype=dtype).to(device)
    options: dict[str, Any] = {"format": weight.format, "dtype": weight.dtype, "shape": shape}
    for tile, tolerance in ((1 << 21, 0.0), (1, 1e-5 if dtype == torch.float32 else 0.05)):
        for kind in products.TILE_ELEMENTS:
            monkeypatch.setitem(products.TILE_ELEMENTS, kind, tile)
        for transposed, b in ((True, None), (True, bias), (False, None)):
            width = shape[1] if transposed else shape[0]
            input = randn(11, width, dtype=dtype, seed=3).to(device)
            want = nf4_reference.matmul(input, fields, b, **options, transposed=transposed)
            got = backend.matmul(input, fields, b, **options, transposed=transposed)
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@by_dtype
def test_tensors_on_a_gpu_take_these_kernels(dtype: torch.dtype) -> None:
    weight = torch.randn(96, 128).to(dtype)
    on_cpu, on_gpu = to_nf4(weight), to_nf4(weight.cuda())
    assert torch.equal(on_cpu.codes, on_gpu.codes.cpu())
    assert torch.equal(on_cpu.dequantize(), on_gpu.dequantize().cpu())
    for rows in (2, 40):
        input = torch.randn(rows, 128, dtype=dtype)
        leaf = input.cuda().requires_grad_()
        output = linear_nf4(leaf, on_gpu)
        output.sum().backward()
        assert leaf.grad is not None
        assert_rounded_product(output.detach(), input, on_cpu.dequantize(), None)
        ones = torch.ones(rows, 96)
        assert_rounded_product(leaf.grad, ones, on_cpu.dequantize().t(), None)
