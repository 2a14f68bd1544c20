"""One thread per test process: pytest-xdist brings the parallelism, and small tensors need none."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch
os.environ.pop("COLUMNS", None)  # of pytest's own terminal, for which readline sets it

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton, which asks only then


@pytest.fixture(autouse=True)
def _quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs warn of a CPU that others use, such as the other tests."""
    from qlora_builders.analysis import preflight

    monkeypatch.setattr(preflight, "busy_elsewhere", lambda: 0)
