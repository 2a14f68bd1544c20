"""What a run computes on."""

from __future__ import annotations

import json
import os
import platform
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from qlora_builders.errors import ConfigError
from qlora_builders.training.device import (
    describe_environment,
    device_name,
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
    for amx, avx, dtype in (
        (True, False, torch.bfloat16),
        (False, True, torch.bfloat16),
        (False, False, torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda native=amx: native)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=avx: native)
        assert resolve_compute_dtype("auto", CPU) == dtype


HEAP = """
import sys
import torch
from qlora_builders import LlamaArch, llama
from qlora_builders.training.device import bound_heap

def resident_mib():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) >> 10

arch = LlamaArch(vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1,
                 num_kv_heads=1, head_dim=8, max_position_embeddings=8)
model = llama(arch).train()
ids = torch.zeros(1, 4, dtype=torch.long)
mode = sys.argv[1]
model.model.activation_checkpointing = "none" if mode == "control" else mode
model(ids)  # imports what it needs
torch.ones(1 << 20)  # freed: from now on glibc takes up to 4 MiB from its heap
if mode != "control":
    bound_heap(model)
before = resident_mib()
tensors = [torch.ones(1 << 19) for _ in range(64)]  # 2 MiB each
del tensors[:-1]  # the last lies above them in the heap
model(ids)
print(resident_mib() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's heap")
def test_the_heap_gives_back_what_is_freed() -> None:
    kept = {
        mode: int(subprocess.check_output([sys.executable, "-c", HEAP, mode]))
        for mode in ("control", "none", "full")
    }
    assert kept["control"] > 100  # MiB of 126
    assert max(kept["none"], kept["full"]) < 10


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


def test_an_environment_has_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["qlora", "finetune", "prompt=a b"])
    monkeypatch.setenv("HF_TOKEN", "secret-token")
    about = describe_environment(CPU, torch.bfloat16)
    assert about["command"] == "qlora finetune 'prompt=a b'"
    assert (about["compute_dtype"], about["torch"]) == ("bfloat16", torch.__version__)
    assert "secret-token" not in json.dumps(about)
    assert os.uname().nodename not in about.values()


@pytest.mark.gpu
def test_a_gpu_is_named() -> None:
    name = torch.cuda.get_device_name(0)
    assert name in device_name(torch.device("cuda", 0))
