"""What a run computes on: device, dtype, seed, memory, compiled layers, and a record of it all."""

from __future__ import annotations

import ctypes
import os
import platform
import random
import resource
import shlex
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qlora_builders import __version__
from qlora_builders.console import Gather, alone
from qlora_builders.errors import ConfigError
from qlora_builders.modules import CausalLM
from qlora_builders.tensor.sharded import compute_device

_M_MMAP_THRESHOLD = -3  # of mallopt, in malloc.h


def resolve_device(name: str, *, local_rank: int = 0) -> torch.device:
    """A torch device; "auto" is the GPU if there is one, of several on a machine this rank's.

    Raises ConfigError for a device that this machine or this build of torch does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and device.index is None and local_rank:
        device = torch.device("cuda", local_rank)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device={name}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA "
            "devices here; use device=cpu or device=auto"
        )
    return device


def resolve_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def resolve_compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 where the hardware multiplies it natively, else float32.

    On CPUs that means AMX or AVX512-BF16: with the latter (AMD EPYC, Zen 4) a QLoRA step took 0.56
    of its CPU time in float32, with AVX-512 alone 2.6 times as long.
    """
    if name != "auto":
        return resolve_dtype(name)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        cpu = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        native = device.type == "cpu" and cpu
    return torch.bfloat16 if native else torch.float32


def set_seed(seed: int) -> None:
    """Seed Python, numpy and torch on every device; dropout and adapter initialisation follow."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def bound_heap(model: CausalLM) -> None:
    """On CPUs, let training keep less of what it frees: glibc's heap holds on to the holes.

    With activation checkpointing, which is there to save memory, tensors of 1 MiB and more get
    mappings of their own (for the whole process): 336 instead of 500 MiB at the peak (28M
    parameters, 1536 tokens, float32), for a second more of system time in a step of eight. Without
    it the holes go back once per pass, before the loss: 940 instead of 1060 MiB (374M, 512 tokens),
    for 0.1 s more.
    Other C libraries are left as they are.
    """
    libc = ctypes.CDLL(None)
    known = hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")
    if not (known and model.model.norm.weight.is_cpu):
        return
    if model.model.activation_checkpointing != "none":
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 20)
        return

    def hook(module: nn.Module, args: Any) -> None:
        if module.training:
            libc.malloc_trim(0)

    model.model.norm.register_forward_pre_hook(hook)


def peak_memory_mib(device: torch.device) -> float:
    """Most memory used so far: of the GPU's allocator, or resident in the process. MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


# `auto` compiles when the run's matmuls take longer than this. CPU: compiling took 60 s on a busy
# machine and saved 2 % of a step (CPU time of one AVX-512 thread, medians of three: 8.05 s and
# 7.89 s; 374M parameters, 512 tokens, float32). CUDA: not measured; torchtune's published figures
# (7075 and 8998 tokens/s) say 21 %.
_PAYS_AFTER_SECONDS = {"cpu": 3000.0, "cuda": 300.0}
# Graphs per layer code: kinds of layers in a plan, times batches of one row and of several.
_GRAPHS = 64


def compile_layers(model: CausalLM, mode: str, *, num_tokens: int, gather: Gather = alone) -> bool:
    """Compile every decoder layer in place, or not; says which. The mode:

    auto  where the run is long enough to gain time
    on    whatever it costs
    off   never

    All layers of a kind share one graph: compiling takes as long for 80 layers as for one, and
    sequence lengths are symbolic, so that rows of any length run the same code. PyTorch keeps it on
    disk (TORCHINDUCTOR_CACHE_DIR): a later run of the same model starts in a few seconds.
    Weights, their names and hooks stay as they are, random numbers (dropout) are those of
    uncompiled layers, and FSDP2's hooks run around the compiled code.

    Args:
        num_tokens: of the whole run on this rank, for "auto".
    """
    if mode == "off":
        return False
    if mode == "auto":
        enough = _PAYS_AFTER_SECONDS.get(compute_device(model).type)
        pays = enough is not None and matmul_seconds(model, num_tokens) > enough
        if not gather(pays)[0]:
            return False
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _GRAPHS)
    dynamo.skip_fsdp_guards = False  # else sizes of a sharded layer are taken for symbolic ones
    for layer in model.model.layers:
        layer.compile(fullgraph=True, dynamic=True, options={"fallback_random": True})

    def require_grad(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.requires_grad_() if torch.is_grad_enabled() else output

    # a frozen embedding would give the first layer a graph of its own, without an input gradient
    model.model.embed_tokens.register_forward_hook(require_grad)
    return True


def is_compiled(model: CausalLM) -> bool:
    return model.model.layers[0]._compiled_call_impl is not None


def matmul_seconds(model: CausalLM, num_tokens: int, *, rows: int = 512, size: int = 2048) -> float:
    """Estimated seconds of two products of all layers' weights with `num_tokens` tokens, by those
    that [rows, size] @ [size, size] takes."""
    weights = sum(
        module.weight.numel()
        for name, module in model.model.layers.named_modules()
        if hasattr(module, "in_features") and "lora_" not in name
    )
    device, dtype = compute_device(model), model.model.compute_dtype
    a = torch.ones(rows, size, device=device, dtype=dtype)
    b = torch.ones(size, size, device=device, dtype=dtype)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for a GPU
        times.append(time.perf_counter() - started)
    return 2 * weights * num_tokens * min(times) / (rows * size * size)


_PACKAGES = ("torch", "triton", "numpy", "safetensors", "tokenizers", "datasets")


def describe_environment(device: torch.device, compute_dtype: torch.dtype) -> dict[str, Any]:
    """Versions, device and command; no user, host or environment variable."""

    def version_of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "directory": str(Path.cwd()),
        "device": device_name(device),
        "compute_dtype": str(compute_dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "qlora_builders": __version__,
        "cuda": torch.version.cuda,
        **{name: version_of(name) for name in _PACKAGES},
    }


def device_name(device: torch.device) -> str:
    """ "cuda:0 NVIDIA H100 80GB HBM3 (79.1 GiB)" or "cpu (2 cores)"."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{device} {properties.name} ({properties.total_memory / 2**30:.1f} GiB)"
    return f"{device} ({os.cpu_count()} cores)"
