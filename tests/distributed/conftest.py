"""A checkpoint with odd sizes, and the command line of a short run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from archs import tiny_arch

from qlora_builders import llama, save_checkpoint
from qlora_builders.checkpoint import read_arch
from qlora_builders.config.shipped import shipped_dir


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes that no number of ranks divides, and the demo's tokenizer."""
    demo = shipped_dir("demo") / "base"
    torch.manual_seed(0)
    sizes = {"hidden_size": 42, "intermediate_size": 75, "num_heads": 3, "num_kv_heads": 1}
    vocab_size = read_arch(demo).vocab_size
    arch = tiny_arch(vocab_size=vocab_size, head_dim=14, max_position_embeddings=128, **sizes)
    path = tmp_path_factory.mktemp("base") / "hf"
    save_checkpoint(llama(arch, dtype=torch.float32), path)
    for file in demo.glob("tokenizer*"):
        shutil.copy(file, path)
    return path


@pytest.fixture(scope="session")
def overrides(base: Path) -> list[str]:
    """20 steps of 2 x 3 rows; 25 rows make the last batch of an epoch one row short of two."""
    return [
        f"checkpoint.dir={base}",
        "data.max_rows=25",
        "training.max_steps=20",
        "training.batch_size=3",
        "training.grad_accumulation=2",
        "training.dtype=float32",
        "training.compute_dtype=float32",
        "training.save_every=10",
        "training.keep_last=2",
        "method.rank=3",
        "optimizer.lr=0.003",
    ]
