"""One thread per test process: pytest-xdist brings the parallelism, and small tensors need none."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton, which asks only then
