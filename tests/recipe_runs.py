"""What tests of recipes share: command lines of tiny runs, and what those left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from qlora_builders import cli

F32 = "compute_dtype=float32"


def train(verb: str, checkpoint: Path, data: Path, run: Path, *overrides: str) -> int:
    """A short run in float32 that learns quickly and evaluates on what it trains on."""
    return cli.main(
        [
            verb,
            f"checkpoint.dir={checkpoint}",
            f"data.train={data}",
            f"data.eval={data}",
            f"output_dir={run}",
            "training.compute_dtype=float32",
            "optimizer.lr=1e-2",
            *overrides,
        ]
    )


def metrics(run: Path, key: str) -> list[Any]:
    """The values of a key in metrics.jsonl."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row[key] for row in map(json.loads, lines) if key in row]


def same_adapter(run: Path, other: Path) -> bool:
    """Bit for bit."""
    ours, theirs = (load_file(r / "adapter" / "adapter_model.safetensors") for r in (run, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
