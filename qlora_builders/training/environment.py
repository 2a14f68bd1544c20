"""environment.jsonl: on what each process of a run computed."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from qlora_builders import __version__
from qlora_builders.files.outputs import append_rows

ENVIRONMENT_FILE = "environment.jsonl"
_PACKAGES = ("torch", "triton", "numpy", "safetensors", "tokenizers", "datasets")


def describe_environment(device: torch.device, compute_dtype: torch.dtype) -> dict[str, Any]:
    """Versions, device and command; no user, host or environment variable."""
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
        **{name: _version(name) for name in _PACKAGES},
    }


def add_environment(run_dir: Path, about: Mapping[str, Any], *, first_step: int) -> None:
    """Append a line for a process that takes the run from `first_step` on."""
    append_rows(run_dir / ENVIRONMENT_FILE, [{"first_step": first_step, **about}])


def device_name(device: torch.device) -> str:
    """ "cuda:0 NVIDIA H100 80GB HBM3 (79.1 GiB)" or "cpu (2 cores)"."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{device} {properties.name} ({properties.total_memory / 2**30:.1f} GiB)"
    return f"{device} ({os.cpu_count()} cores)"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
