"""Which device and dtype a run uses, its seed, and the memory it took."""

from __future__ import annotations

import random
import resource
import sys

import numpy as np
import torch

from qlora_builders.errors import ConfigError


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

    On CPUs that means AMX: AVX-512 alone ran a QLoRA step 2.6 times slower in bfloat16.
    """
    if name != "auto":
        return resolve_dtype(name)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def set_seed(seed: int) -> None:
    """Seed Python, numpy and torch on every device; dropout and adapter initialisation follow."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def peak_memory_mib(device: torch.device) -> float:
    """Most memory used so far: of the GPU's allocator, or resident in the process. MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
