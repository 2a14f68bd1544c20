"""The compiled CPU kernels equal the reference bit for bit, and their absence is survived."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nf4_weights import DTYPES, FORMATS, adversarial, bits

from qlora_builders import linear_nf4, to_nf4
from qlora_builders.kernels import NF4Format, nf4_cpu, nf4_reference, products

pytestmark = pytest.mark.skipif(
    shutil.which(os.environ.get("CC", "cc")) is None, reason="needs a C compiler"
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale_format", FORMATS)
def test_equals_the_reference(dtype: torch.dtype, scale_format: str) -> None:
    assert nf4_cpu.supports(NF4Format(scale_format=scale_format), dtype)
    for name, weight in adversarial(dtype).items():
        if scale_format == "bnb" and name == "huge":
            continue  # refused where its mean overflows: the next test
        for size, block_size, scale_block_size in [
            (5000, 64, 256),
            (4999, 32, 7),
            (2048, 4096, 1),
            (65, 64, 2),
            (1, 64, 256),
        ]:
            options: dict[str, Any] = {
                "format": NF4Format(
                    block_size=block_size,
                    scale_block_size=scale_block_size,
                    scale_format=scale_format,
                )
            }
            stored = options["format"]
            for search in (False, True) if scale_format != "bnb" else (False,):
                options["format"] = replace(stored, scale_search=search)
                expected = nf4_reference.quantize(weight[:size], **options)
                got = nf4_cpu.quantize(weight[:size], **options)
                for want, have in zip(expected, got, strict=True):
                    assert torch.equal(bits(want), bits(have)), (name, options)
            options["format"] = stored
            for out_dtype in DTYPES:
                options |= {"shape": (size,), "dtype": dtype, "out_dtype": out_dtype}
                want = nf4_reference.dequantize(expected, **options)
                have = nf4_cpu.dequantize(expected, **options)
                assert torch.equal(bits(want), bits(have)), (name, options)


@pytest.mark.parametrize("backend", [nf4_cpu, nf4_reference])
def test_bnb_refuses_a_mean_scale_that_overflows(backend: Any) -> None:
    weight = torch.full((640,), torch.finfo(torch.float32).max)
    with pytest.raises(ValueError, match="too large for scale_format 'bnb'"):
        backend.quantize(
            weight, format=NF4Format(block_size=64, scale_block_size=256, scale_format="bnb")
        )


def test_every_half_converts_exactly() -> None:
    """All finite float16 values are block maxima once: the conversions agree with torch's."""
    weight = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    weight = weight[torch.isfinite(weight)].repeat_interleave(32)
    options: dict[str, Any] = {
        "format": NF4Format(block_size=32, scale_block_size=256, scale_format="none")
    }
    for want, have in zip(
        nf4_reference.quantize(weight, **options),
        nf4_cpu.quantize(weight, **options),
        strict=True,
    ):
        assert torch.equal(want, have)


def test_a_range_is_part_of_the_whole() -> None:
    weight = adversarial(torch.bfloat16)["normal"]
    options: dict[str, Any] = {
        "format": NF4Format(block_size=64, scale_block_size=3, scale_format="geometric"),
        "dtype": torch.bfloat16,
    }
    q = to_nf4(weight, scale_block_size=3)
    whole = q.dequantize(torch.float32)
    for start, stop in [(0, 64), (64, 128), (192, 1000), (4992, 5000), (0, 5000)]:
        out = torch.empty(stop - start)
        fields = q.fields
        nf4_cpu.dequantize_range_(out, fields, start=start, **options)
        assert torch.equal(out, whole[start:stop])


@pytest.mark.parametrize("scale_format", FORMATS)
def test_elements_beyond_two_to_the_31_are_found(scale_format: str) -> None:
    """Only the pages that are written here ever exist: the codes take 1.5 GiB of addresses."""
    part = to_nf4(torch.randn(2 * 256 * 64), scale_format=scale_format)
    first = 3 * 2**30  # in elements; whole blocks and groups
    codes = torch.empty(first // 2 + part.codes.numel(), dtype=torch.uint8)
    codes[first // 2 :] = part.codes
    scales = torch.empty(first // 64 + part.scales.numel(), dtype=part.scales.dtype)
    scales[first // 64 :] = part.scales
    groups = torch.empty(first // (64 * 256) + 2, 2)
    if scale_format != "none":
        groups[-2:] = part.scale_groups
    out = torch.empty(part.numel())
    nf4_cpu.dequantize_range_(
        out, (codes, scales, groups), start=first, dtype=part.dtype, format=part.format
    )
    assert torch.equal(out, part.dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(37, 52), (64, 100), (5, 129)], ids=str)
def test_tiled_products_are_those_of_the_reference(
    dtype: torch.dtype, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One tile gives the same bits; many tiles the same sums in another order."""
    generator = torch.Generator().manual_seed(0)
    weight = to_nf4(torch.randn(shape, generator=generator).bfloat16(), block_size=32)
    bias = torch.randn(shape[0], generator=generator).to(dtype)
    fields = weight.fields
    options = {"format": weight.format, "dtype": weight.dtype, "shape": shape}
    for tile, tolerance in ((1 << 21, 0.0), (1, 1e-5 if dtype == torch.float32 else 0.05)):
        monkeypatch.setitem(products.TILE_ELEMENTS, "cpu", tile)
        for transposed in (True, False):
            width = shape[1] if transposed else shape[0]
            input = torch.randn(6, width, generator=generator).to(dtype)
            for b in (None, bias) if transposed else (None,):
                args = (input, fields, b)
                want = nf4_reference.matmul(*args, **options, transposed=transposed)
                got = nf4_cpu.matmul(*args, **options, transposed=transposed)
                torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(96, 256), (40, 1024)], ids=str)
def test_some_columns_at_a_time(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """No sums are left to add up: as exact as one product."""
    monkeypatch.setattr(products, "_FEWEST_COLUMNS", 64)
    generator = torch.Generator().manual_seed(0)
    weight = to_nf4(torch.randn(shape, generator=generator).bfloat16(), scale_block_size=3)
    options = {"format": weight.format, "dtype": weight.dtype, "shape": shape, "transposed": False}
    args = weight.fields, None
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        grad = torch.randn(70, shape[0], generator=generator).to(dtype)
        want = nf4_reference.matmul(grad, *args, **options)
        for columns in (64, 128, 192):
            monkeypatch.setitem(products.TILE_ELEMENTS, "cpu", shape[0] * columns + 63)
            got = nf4_cpu.matmul(grad, *args, **options)
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pieces_that_lie_apart(dtype: torch.dtype, scale_format: str) -> None:
    weight = to_nf4(torch.randn(6, 256).to(dtype), block_size=32, scale_format=scale_format)
    fields = weight.fields
    for out_dtype in DTYPES:
        out = torch.full((3, 96), 7, dtype=out_dtype)
        options = {"format": weight.format, "dtype": dtype, "start": 2 * 256 + 64, "stride": 256}
        nf4_cpu.dequantize_range_(out, fields, **options)
        assert torch.equal(out, weight.dequantize(out_dtype)[2:5, 64:160])


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_rows_are_multiplied_without_decoding(dtype: torch.dtype, scale_format: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for shape, sizes in (((50, 128), (64, 256)), ((7, 96), (32, 5)), ((1, 64), (32, 1))):
        weight = torch.randn(shape, generator=generator).to(dtype)
        weight[0, :40] = 0
        q = to_nf4(
            weight, block_size=sizes[0], scale_block_size=sizes[1], scale_format=scale_format
        )
        options = {"format": q.format, "dtype": dtype, "shape": shape, "transposed": True}
        fields = q.fields
        for input_dtype, tolerance in zip(DTYPES, (1e-5, 4e-3, 5e-4), strict=True):
            exact = q.dequantize(input_dtype).double()
            bias = torch.randn(shape[0], generator=generator).to(input_dtype)
            for rows in range(1, nf4_cpu._FEW_ROWS + 1):
                input = torch.randn(rows, shape[1], generator=generator).to(input_dtype)
                for b in (None, bias):
                    got = nf4_cpu.matmul(input, fields, b, **options)
                    want = input.double() @ exact.t() + (0 if b is None else b.double())
                    assert got.dtype == input_dtype
                    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def test_few_rows_give_the_same_bits_with_any_number_of_threads() -> None:
    weight, input = to_nf4(torch.randn(65, 256)), torch.randn(3, 256)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(linear_nf4(input, weight))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_backends_refuse_what_is_not_finite(value: float, dtype: torch.dtype) -> None:
    weight = torch.ones(300, dtype=dtype)
    weight[299] = value
    for backend in (nf4_cpu, nf4_reference):
        with pytest.raises(ValueError, match="the weight has NaN or infinite elements"):
            backend.quantize(
                weight,
                format=NF4Format(block_size=64, scale_block_size=2, scale_format="geometric"),
            )


def test_strided_weights_and_thread_counts_give_the_same_bits() -> None:
    weight = torch.randn(96, 130)
    expected = to_nf4(weight.t().contiguous())
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            got = to_nf4(weight.t())
            assert torch.equal(got.codes, expected.codes)
            assert torch.equal(got.dequantize(), expected.dequantize())
    finally:
        torch.set_num_threads(threads)


def test_no_gradient_state_is_left_in_a_parameter() -> None:
    q = to_nf4(torch.nn.Parameter(torch.randn(4, 64)))
    assert not q.requires_grad
    assert not q.codes.requires_grad


PROBE = """
import warnings, torch
from qlora_builders import to_nf4
from qlora_builders.kernels import nf4_cpu
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    q = to_nf4(torch.linspace(-1, 1, 640))
    q.dequantize()
    supported = nf4_cpu.supports(q.format, torch.float32)
print(supported, len(caught), q.dequantize().sum().item(), *[str(w.message) for w in caught])
"""


def run_probe(cache: Path, compiler: str) -> str:
    env = {**os.environ, "CC": compiler, "QLORA_BUILDERS_CACHE": str(cache)}
    return subprocess.run(
        [sys.executable, "-c", PROBE], env=env, capture_output=True, text=True, check=True
    ).stdout


def test_without_a_compiler_the_reference_serves_with_one_warning(tmp_path: Path) -> None:
    compiler = os.environ.get("CC", "cc")
    supported, count, total, *_ = run_probe(tmp_path / "a", compiler).split()
    assert (supported, count) == ("True", "0")
    assert [path.suffix for path in (tmp_path / "a").iterdir()] == [".so"]
    output = run_probe(tmp_path / "b", "no-such-compiler")
    assert output.startswith(f"False 1 {total} the NF4 CPU kernels could not be compiled")
    assert "install a C compiler or set CC" in output


def test_the_library_is_compiled_once(tmp_path: Path) -> None:
    run_probe(tmp_path, os.environ.get("CC", "cc"))
    (library,) = tmp_path.iterdir()
    made = library.stat().st_mtime_ns
    run_probe(tmp_path, os.environ.get("CC", "cc"))
    assert library.stat().st_mtime_ns == made


MEMORY = """
import sys, torch
from pathlib import Path
from qlora_builders import to_nf4

def kib(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))

weight = torch.randn(4096, 4096).bfloat16()
to_nf4(weight[:64], scale_format=sys.argv[1])
Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
before = kib("VmRSS")
quantized = to_nf4(weight, scale_format=sys.argv[1])
print(((kib("VmHWM") - before) * 1024 - quantized.nbytes) / weight.nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("scale_format", FORMATS)
def test_quantizing_takes_little_memory_beside_the_result(scale_format: str) -> None:
    command = [sys.executable, "-c", MEMORY, scale_format]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.1  # of the weight's own bytes
