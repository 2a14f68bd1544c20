"""Compiles and calls `nf4_cpu.c`, the CPU kernels.

The C compiler runs once per machine and source version, about two seconds; the library is kept in
the user's cache folder. It shares torch's OpenMP threads and honours `torch.get_num_threads()`.
Without a working compiler the PyTorch reference is used, with one warning: the results are the
same, quantizing is then about a hundred times slower.

Environment: CC names the compiler (default cc), QLORA_BUILDERS_CACHE the cache folder.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
import platform
import shlex
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from qlora_builders.kernels.nf4_reference import (
    NOT_FINITE,
    dynamic_codebook,
    encode_scales,
    field_shapes,
)
from qlora_builders.kernels.tiles import tiled_matmul

_SOURCE = Path(__file__).with_name("nf4_cpu.c")
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fPIC", "-shared", "-std=gnu11")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FORMATS = {"geometric": 0, "none": 1, "bnb": 2}
_NOT_FINITE = 1


def supports(scale_format: str, *dtypes: torch.dtype) -> bool:
    """Whether the kernels take this format and these dtypes here (and compile at all)."""
    known = scale_format in _FORMATS and all(dtype in _DTYPES for dtype in dtypes)
    return known and _library() is not None


def quantize_nf4(
    weight: Tensor,
    *,
    block_size: int,
    scale_block_size: int,
    scale_format: str,
    scale_search: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `nf4_reference.quantize_nf4`; a strided weight is copied first."""
    weight = weight.contiguous()
    codes_shape, scales_shape, groups_shape = field_shapes(
        weight.numel(),
        block_size=block_size,
        scale_block_size=scale_block_size,
        scale_format=scale_format,
    )
    codes = torch.empty(codes_shape, dtype=torch.uint8)
    scale_dtype = torch.uint8 if scale_format == "geometric" else torch.float32
    scales = torch.empty(scales_shape, dtype=scale_dtype)
    groups = torch.empty(groups_shape, dtype=torch.float32)
    library = _library()
    assert library is not None
    status = library.qlora_quantize_nf4(
        weight.data_ptr(),
        codes.data_ptr(),
        scales.data_ptr(),
        groups.data_ptr(),
        weight.numel(),
        block_size,
        scale_block_size,
        _FORMATS[scale_format],
        _DTYPES[weight.dtype],
        scale_search,
        torch.get_num_threads(),
    )
    if status == _NOT_FINITE:
        raise ValueError(NOT_FINITE)
    if status:
        raise MemoryError("out of memory while quantizing a weight")
    if scale_format == "bnb":
        scales, groups = encode_scales(
            scales, scale_block_size=scale_block_size, scale_format="bnb", dtype=weight.dtype
        )
    return codes, scales, groups


def dequantize_nf4(
    codes: Tensor,
    scales: Tensor,
    scale_groups: Tensor,
    *,
    numel: int,
    block_size: int,
    scale_block_size: int,
    scale_format: str,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:
    """As `nf4_reference.dequantize_nf4`."""
    out = torch.empty(numel, dtype=out_dtype)
    dequantize_range_(
        out,
        codes,
        scales,
        scale_groups,
        start=0,
        block_size=block_size,
        scale_block_size=scale_block_size,
        scale_format=scale_format,
        dtype=dtype,
    )
    return out


def dequantize_range_(
    out: Tensor,
    codes: Tensor,
    scales: Tensor,
    scale_groups: Tensor,
    *,
    start: int,
    block_size: int,
    scale_block_size: int,
    scale_format: str,
    dtype: torch.dtype,
) -> None:
    """Decode the elements from `start` (a multiple of block_size) into all of contiguous `out`."""
    library = _library()
    assert library is not None
    assert out.is_contiguous()
    assert start % block_size == 0
    library.qlora_dequantize_nf4(
        codes.data_ptr(),
        scales.data_ptr(),
        scale_groups.data_ptr(),
        dynamic_codebook().data_ptr(),
        out.data_ptr(),
        start,
        start + out.numel(),
        block_size,
        scale_block_size,
        _FORMATS[scale_format],
        _DTYPES[dtype],
        _DTYPES[out.dtype],
        torch.get_num_threads(),
    )


def matmul_nf4(
    input: Tensor,
    codes: Tensor,
    scales: Tensor,
    scale_groups: Tensor,
    bias: Tensor | None,
    *,
    shape: Sequence[int],
    transposed: bool,
    block_size: int,
    scale_block_size: int,
    scale_format: str,
    dtype: torch.dtype,
) -> Tensor:
    """As `nf4_reference.matmul_nf4`, decoding some rows of the weight at a time."""

    def decode(first: int, rows: Tensor) -> None:
        dequantize_range_(
            rows.view(-1),
            codes,
            scales,
            scale_groups,
            start=first * shape[1],
            block_size=block_size,
            scale_block_size=scale_block_size,
            scale_format=scale_format,
            dtype=dtype,
        )

    return tiled_matmul(
        input,
        bias,
        decode,
        shape=shape,
        transposed=transposed,
        row_multiple=block_size // math.gcd(shape[1], block_size),  # a tile begins with a block
    )


# ---- building -----------------------------------------------------------------------------------


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        path = _build()
        library = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        details = getattr(error, "stderr", None) or error
        warnings.warn(
            "the NF4 CPU kernels could not be compiled, so the slow PyTorch reference is used; "
            f"install a C compiler or set CC. {details}",
            stacklevel=2,
        )
        return None
    pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    library.qlora_quantize_nf4.argtypes = [pointer] * 4 + [size] * 3 + [integer] * 4
    library.qlora_dequantize_nf4.argtypes = [pointer] * 5 + [size] * 4 + [integer] * 4
    library.qlora_dequantize_nf4.restype = None
    return library


def _build() -> Path:
    """Path of the compiled library, made now if this machine has not made it before."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    key = "\n".join([_SOURCE.read_text(), *_FLAGS, *compiler, _cpu_identity(), torch.__version__])
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    target = _cache_dir() / f"nf4_cpu_{digest}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            _compile(compiler, Path(folder))
            os.replace(Path(folder) / "nf4.so", target)  # another process may do the same
    return target


def _compile(compiler: list[str], folder: Path) -> None:
    """To an object with OpenMP, then linked without it, so that torch's OpenMP serves it.

    A second OpenMP library in the process would bring its own, competing threads. Compilers
    without OpenMP give a library that works in one thread.
    """
    object_file, library = folder / "nf4.o", folder / "nf4.so"
    base = [*compiler, *(flag for flag in _FLAGS if flag != "-shared")]
    with_openmp = [*base, "-fopenmp", "-c", str(_SOURCE), "-o", str(object_file)]
    if subprocess.run(with_openmp, capture_output=True, check=False).returncode == 0:
        _run([*compiler, "-shared", str(object_file), "-o", str(library)])
        try:
            ctypes.CDLL(str(library), mode=os.RTLD_NOW)
            return
        except OSError:
            pass  # torch brings no OpenMP whose symbols can be used
    _run([*compiler, *_FLAGS, "-Wno-unknown-pragmas", str(_SOURCE), "-o", str(library)])


def _run(command: list[str]) -> None:
    subprocess.run(command, capture_output=True, check=True, text=True, timeout=120)


def _cache_dir() -> Path:
    chosen = os.environ.get("QLORA_BUILDERS_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "qlora_builders"


def _cpu_identity() -> str:
    """-march=native code must not run on another CPU that shares the home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kept = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    return "\n".join(sorted(set(kept)))
