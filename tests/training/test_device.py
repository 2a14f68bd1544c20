from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from qlora_builders.errors import ConfigError
from qlora_builders.training.device import (
    peak_memory_mib,
    resolve_compute_dtype,
    resolve_device,
    set_seed,
)

CPU = torch.device("cpu")


def test_devices() -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert resolve_device("auto").type == expected
    assert resolve_device("cpu") == CPU
    with pytest.raises(ConfigError, match=r"device=cuda:99: torch .* sees \d+ CUDA devices"):
        resolve_device("cuda:99")


def test_compute_dtype_auto_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_compute_dtype("float16", CPU) == torch.float16
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda native=native: native)
        assert resolve_compute_dtype("auto", CPU) == dtype


def test_a_seed_fixes_every_generator() -> None:
    draws = []
    for _ in range(2):
        set_seed(2**40 + 3)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]


def test_peak_memory_grows_with_what_is_held() -> None:
    before = peak_memory_mib(CPU)
    held = torch.ones(int(before) * 2**18 + 2**26)  # four bytes each: more than the peak so far
    assert peak_memory_mib(CPU) >= held.nbytes / 2**20
