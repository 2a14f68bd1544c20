"""The Triton kernels equal the reference bit for bit: interpreted on CPUs, compiled on a GPU."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from nf4_weights import DTYPES, FORMATS, adversarial, bits
from torch import Tensor

from qlora_builders import kernels as kernels_package
from qlora_builders import linear_nf4, to_nf4
from qlora_builders.kernels import NF4Format, nf4_reference, products

pytest.importorskip("triton")

pytestmark = [
    # the interpreter computes with numpy, which remarks on what IEEE arithmetic is meant to do
    pytest.mark.filterwarnings("ignore:(overflow|divide by zero|invalid value) encountered"),
]
on_each_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("with a GPU the kernels are compiled, not interpreted")
    return str(request.param)


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    """The launchers; `tests/conftest.py` has the kernels interpreted where there is no GPU."""
    return importlib.import_module("qlora_builders.kernels.nf4_triton")


def every_case(dtype: torch.dtype, scale_format: str, numel: int) -> Tensor:
    """`numel` elements of each adversarial weight, one after another, and a tail."""
    weights = adversarial(dtype)
    if scale_format == "bnb":
        del weights["huge"]  # refused where its mean overflows
    return torch.cat([*(weight[:numel] for weight in weights.values()), weights["normal"][:17]])


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize(
    ("block_size", "scale_block_size", "numel"), [(64, 3, 448), (32, 256, 352), (1024, 2, 1025)]
)
def test_equal_the_reference(
    kernels: ModuleType,
    device: str,
    dtype: torch.dtype,
    scale_format: str,
    block_size: int,
    scale_block_size: int,
    numel: int,
) -> None:
    weight = every_case(dtype, scale_format, numel)
    options: dict[str, Any] = {
        "format": NF4Format(
            block_size=block_size, scale_block_size=scale_block_size, scale_format=scale_format
        )
    }
    fields = nf4_reference.quantize(weight.to(device), **options)
    got = kernels.quantize(weight.to(device), **options)
    for want, have in zip(fields, got, strict=True):
        assert torch.equal(bits(want), bits(have))
    expected = [field.cpu() for field in fields]
    options |= {"shape": weight.shape, "dtype": dtype}
    for out_dtype in DTYPES:
        want = nf4_reference.dequantize(expected, **options, out_dtype=out_dtype)
        have = kernels.dequantize(fields, **options, out_dtype=out_dtype)
        assert torch.equal(bits(want), bits(have.cpu())), out_dtype


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale_format", ["geometric", "none"])
def test_scale_search_equals_the_reference(
    kernels: ModuleType, device: str, dtype: torch.dtype, scale_format: str
) -> None:
    weight = every_case(dtype, scale_format, 192)
    options: dict[str, Any] = {
        "format": NF4Format(
            block_size=64, scale_block_size=5, scale_format=scale_format, scale_search=True
        )
    }
    expected = nf4_reference.quantize(weight, **options)
    got = kernels.quantize(weight.to(device), **options)
    for want, have in zip(expected, got, strict=True):
        assert torch.equal(bits(want), bits(have.cpu()))


@on_each_device
@pytest.mark.parametrize("numel", [1, 2, 63, 64, 65, 4097])
def test_odd_sizes_and_empty_weights(kernels: ModuleType, device: str, numel: int) -> None:
    options: dict[str, Any] = {
        "format": NF4Format(block_size=64, scale_block_size=256, scale_format="geometric")
    }
    weight = adversarial(torch.bfloat16)["mixed scales"][:numel]
    expected = nf4_reference.quantize(weight, **options)
    got = kernels.quantize(weight.to(device), **options)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(expected, got, strict=True))
    empty = kernels.quantize(weight[:0].to(device), **options)
    assert [field.numel() for field in empty] == [0, 0, 0]


@on_each_device
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_is_refused(
    kernels: ModuleType, device: str, dtype: torch.dtype, value: float
) -> None:
    weight = torch.ones(300, dtype=dtype, device=device)
    weight[299] = value
    with pytest.raises(ValueError, match="the weight has NaN or infinite elements"):
        kernels.quantize(
            weight, format=NF4Format(block_size=64, scale_block_size=2, scale_format="geometric")
        )


@on_each_device
def test_large_groups_are_encoded_by_the_reference(kernels: ModuleType, device: str) -> None:
    weight = torch.randn(5000 * 32)
    options: dict[str, Any] = {
        "format": NF4Format(block_size=32, scale_block_size=5000, scale_format="geometric")
    }
    expected = nf4_reference.quantize(weight, **options)
    got = kernels.quantize(weight.to(device), **options)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(expected, got, strict=True))


@on_each_device
def test_elements_beyond_two_to_the_31_are_found(kernels: ModuleType, device: str) -> None:
    """Only the pages that are written here ever exist on a CPU: 1.5 GiB of addresses."""
    part = to_nf4(torch.randn(2 * 256 * 64))
    first = 3 * 2**30  # in elements; whole blocks and groups
    codes = torch.empty(first // 2 + part.codes.numel(), dtype=torch.uint8, device=device)
    codes[first // 2 :] = part.codes
    scales = torch.empty(first // 64 + part.scales.numel(), dtype=torch.uint8, device=device)
    scales[first // 64 :] = part.scales
    groups = torch.empty(first // (64 * 256) + 2, 2, device=device)
    groups[-2:] = part.scale_groups
    out = torch.empty(part.numel(), device=device)
    kernels.dequantize_range_(
        out, (codes, scales, groups), start=first, dtype=part.dtype, format=part.format
    )
    assert torch.equal(out.cpu(), part.dequantize())


def assert_rounded_product(have: Tensor, input: Tensor, dense: Tensor, bias: Tensor | None) -> None:
    """Against the float64 product with weights `dense`, one rounding of each and of the result.

    Roundings of the weights are independent: four standard deviations of their sum.
    """
    x, w = input.double(), dense.double()
    want = x @ w.t() if bias is None else x @ w.t() + bias.double()
    unit = max(torch.finfo(have.dtype).eps / 2, 2**-22)  # float32 adds up in another order
    bound = 4 * unit * (x.square() @ w.square().t()).sqrt() + 1.01 * unit * want.abs()
    assert ((have.cpu().double() - want).abs() <= bound).all()


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("shape", [(37, 128), (5, 192), (3, 1088)], ids=str)
def test_products_with_a_few_rows(
    kernels: ModuleType,
    device: str,
    dtype: torch.dtype,
    scale_format: str,
    shape: tuple[int, int],
) -> None:
    """The matrix-vector kernel, against a float64 product with the dequantized weight."""
    generator = torch.Generator().manual_seed(0)
    weight = to_nf4(
        torch.randn(shape, generator=generator).to(dtype),
        scale_block_size=5,
        scale_format=scale_format,
    )
    fields = [f.to(device) for f in weight.fields]
    bias = torch.randn(shape[0], generator=generator).to(dtype)
    options = {"format": weight.format, "dtype": dtype, "shape": shape, "transposed": True}
    for rows in (1, 3, 8):
        input = torch.randn(rows, shape[1], generator=generator).to(dtype)
        for b in (None, bias):
            moved = None if b is None else b.to(device)
            have = kernels.matmul(input.to(device), fields, moved, **options)
            assert have.dtype == dtype
            assert_rounded_product(have, input, weight.dequantize(), b)


@on_each_device
@pytest.mark.parametrize("shape", [(37, 52), (64, 100), (16, 128)], ids=str)
def test_products_by_tiles(
    kernels: ModuleType, device: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = to_nf4(torch.randn(shape, generator=generator), block_size=32)
    fields = [f.to(device) for f in weight.fields]
    dense = weight.dequantize().double()
    options = {"format": weight.format, "dtype": weight.dtype, "shape": shape}
    monkeypatch.setitem(products.TILE_ELEMENTS, "cpu", 1)
    monkeypatch.setitem(products.TILE_ELEMENTS, "cuda", 1)
    for transposed in (True, False):
        width = shape[1] if transposed else shape[0]
        input = torch.randn(11, width, generator=generator)
        want = input.double() @ (dense.t() if transposed else dense)
        have = kernels.matmul(input.to(device), fields, None, **options, transposed=transposed)
        torch.testing.assert_close(have.cpu().double(), want, rtol=1e-5, atol=1e-5)


def test_without_triton_the_reference_serves_with_one_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "qlora_builders.kernels.nf4_triton", None)
    select = kernels_package._nf4_backend
    kernels_package._triton_backend.cache_clear()
    try:
        with pytest.warns(UserWarning, match="Triton is not installed.*pip install triton"):
            backend = select(torch.device("cuda"), NF4Format(), torch.float32)
        assert backend is nf4_reference
        assert select(torch.device("cuda"), NF4Format(), torch.float32) is nf4_reference  # no more
    finally:
        kernels_package._triton_backend.cache_clear()


COMPILE = """
import subprocess, sys, tempfile
from pathlib import Path
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from qlora_builders.kernels import nf4_triton_kernels as kernels

POINTERS = {
    "weight": "*i16", "x": "*i16", "bias": "*i16", "out": "*i16", "codes": "*u8", "scales": "*u8",
}
SIZES = ("numel", "num_blocks", "first_block", "count", "num_bytes", "rows_in", "in_features",
         "out_features")
ALIGNED = ("numel", "num_blocks", "count", "num_bytes", "in_features")
CONSTANTS = {
    "BLOCK_SIZE": 64, "SCALE_BLOCK_SIZE": 256, "LANES": 256, "ROWS": 64, "DTYPE": 1,
    "OUT_DTYPE": 1, "FORMAT": 0, "SMALLEST_NORMAL": torch.finfo(torch.bfloat16).tiny,
    "LEVELS": 6, "BATCH": 8, "BLOCKS": 8, "HAS_BIAS": True,
}
for name in sys.argv[1].split(","):
    kernel = getattr(kernels, name)
    constants = {k: v for k, v in CONSTANTS.items() if k in kernel.arg_names}
    if name == "matvec_kernel":
        constants["ROWS"] = 8
    signature = {
        argument: "constexpr" if argument in constants
        else "i32" if argument in SIZES
        else POINTERS.get(argument, "*fp32")
        for argument in kernel.arg_names
    }
    at = {(kernel.arg_names.index(k),): v for k, v in constants.items()}
    # as launched: pointers aligned, sizes of ordinary weights multiples of 16
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, argument in enumerate(kernel.arg_names)
        if signature[argument][0] == "*" or argument in ALIGNED
    }
    for arch in (80, 90):
        source = ASTSource(kernel, signature, constexprs=at, attrs=aligned)
        compiled = compile(
            source, target=GPUTarget("cuda", arch, 32), options={"enable_fp_fusion": False}
        )
        ptx = compiled.asm["ptx"]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(compiled.asm["cubin"])
            tool = Path(triton.__file__).with_name("backends") / "nvidia/bin/cuobjdump"
            usage = subprocess.check_output([tool, "-res-usage", file.name], text=True)
        assert "STACK:0 " in usage and "LOCAL:0 " in usage, f"{name} spills: {usage}"
        assert name == "matvec_kernel" or "fma.rn.f32" not in ptx, f"{name} contracts"
        print(name, arch, len(compiled.asm["cubin"]) > 0)
"""


def test_every_kernel_compiles_for_a_gpu() -> None:
    """To machine code of sm_80 and sm_90, which needs no GPU."""
    names = [f"{n}_kernel" for n in ("absmax", "encode_scales", "codes", "search", "dequantize")]
    names.append("matvec_kernel")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, ",".join(names)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{n} {arch} True" for n in names for arch in (80, 90)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
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
