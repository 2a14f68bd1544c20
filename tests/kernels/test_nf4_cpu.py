"""What the C kernels alone promise: threads, strides, memory; and their absence is survived."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from nf4_cases import DTYPES, FORMATS, all_same_bits, quantized, randn

from qlora_builders.kernels import NF4Format, nf4_cpu, nf4_reference, products
from qlora_builders.tensor import linear_nf4, to_nf4

CC = os.environ.get("CC", "cc")
pytestmark = pytest.mark.skipif(shutil.which(CC) is None, reason="needs a C compiler")


@pytest.fixture
def thread_counts() -> Iterator[tuple[int, ...]]:
    threads = torch.get_num_threads()
    yield 1, 2, 3
    torch.set_num_threads(threads)


def test_every_half_converts_exactly() -> None:
    """All finite float16 values are block maxima once: the conversions agree with torch's."""
    weight = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    weight = weight[torch.isfinite(weight)].repeat_interleave(32)
    format = NF4Format(block_size=32, scale_format="none")
    assert all_same_bits(
        nf4_cpu.quantize(weight, format=format), nf4_reference.quantize(weight, format=format)
    )


@pytest.mark.parametrize("shape", [(96, 256), (40, 1024)], ids=str)
def test_some_columns_at_a_time(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """No sums are left to add up: as exact as one product."""
    monkeypatch.setattr(products, "_FEWEST_COLUMNS", 64)
    weight = quantized(*shape, dtype=torch.bfloat16, scale_block_size=3)
    options = {"format": weight.format, "dtype": weight.dtype, "shape": shape, "transposed": False}
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        grad = randn(70, shape[0], dtype=dtype)
        want = nf4_reference.matmul(grad, weight.fields, None, **options)
        for columns in (64, 128, 192):
            monkeypatch.setitem(products.TILE_ELEMENTS, "cpu", shape[0] * columns + 63)
            got = nf4_cpu.matmul(grad, weight.fields, None, **options)
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pieces_that_lie_apart(dtype: torch.dtype, scale_format: str) -> None:
    weight = quantized(6, 256, dtype=dtype, block_size=32, scale_format=scale_format)
    for out_dtype in DTYPES:
        out = torch.full((3, 96), 7, dtype=out_dtype)
        options = {"format": weight.format, "dtype": dtype, "start": 2 * 256 + 64, "stride": 256}
        nf4_cpu.dequantize_range_(out, weight.fields, **options)
        assert torch.equal(out, weight.dequantize(out_dtype)[2:5, 64:160])


def test_any_number_of_threads_gives_the_same_bits(thread_counts: tuple[int, ...]) -> None:
    plain, input = randn(96, 130), randn(3, 256)
    expected, matrix = to_nf4(plain.t().contiguous()), quantized(65, 256)
    output = linear_nf4(input, matrix)
    for count in thread_counts:
        torch.set_num_threads(count)
        got = to_nf4(plain.t())  # strided
        assert all_same_bits(got.fields, expected.fields)
        assert torch.equal(got.dequantize(), expected.dequantize())
        assert torch.equal(linear_nf4(input, matrix), output)


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
    supported, count, total, *_ = run_probe(tmp_path / "a", CC).split()
    assert (supported, count) == ("True", "0")
    assert [path.suffix for path in (tmp_path / "a").iterdir()] == [".so"]
    output = run_probe(tmp_path / "b", "no-such-compiler")
    assert output.startswith(f"False 1 {total} the NF4 CPU kernels could not be compiled")
    assert "install a C compiler or set CC" in output


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
