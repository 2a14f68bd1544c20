"""Triton's kernels compile for GPUs that are not here, and their absence is survived."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from qlora_builders import kernels as kernels_package
from qlora_builders.kernels import NF4Format, nf4_reference

pytest.importorskip("triton")


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
