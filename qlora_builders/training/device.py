"""Which device and dtype a run uses, its seed, and the memory it took."""

from __future__ import annotations

import ctypes
import random
import resource
import sys
from typing import Any

import numpy as np
import torch
from torch import nn

from qlora_builders.errors import ConfigError
from qlora_builders.modules import CausalLM

_M_MMAP_THRESHOLD = -3  # of mallopt, in malloc.h


def resolve_device(name: str, *, local_rank: int = 0) -> torch.device:
    """A torch device; "auto" is the GPU if there is one, of several on a machine this rank's.

    Raises:
        ConfigError: for a device that this machine or this build of torch does not have.
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
    if not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):
        return
    if not model.model.norm.weight.is_cpu:
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
