"""How a step's time and memory grow with the length of its row; the last line printed is JSON.

usage: python scripts/bench_growth.py [--seqs 512,1024,2048] [--layers 2,4,8] [--repeat 2]
           [--steps 1]

A step of QLoRA (rank 8 on all seven projections, float32, full activation checkpointing, layers not
compiled, batch 1) on Llamas of Llama-3.2-1B's width with random weights and a vocabulary of 32,000.
Every measurement is a process of its own (`bench_train.py`), with one thread: so that CPU time,
which other work on the machine changes little, says how long a step takes.

Time, at the second of `--layers`, `--repeat` alternating runs: `excess` is the time per token over
that of the shortest row, less the time of attention's own FLOPs, measured as scaled dot product
attention of these shapes alone (two forward passes and a backward pass).
Memory: the peak is linear in the tokens, `per_token` a fit of all lengths for every number of
layers; and `per_token` is linear in the layers, with the bytes of a layer's input as its slope.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from qlora_builders import LlamaArch, llama, save_checkpoint

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 2048, 32, 8, 64


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seqs", default="512,1024,2048")
    parser.add_argument("--layers", default="2,4,8")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1)
    args = parser.parse_args()
    seqs = [int(seq) for seq in args.seqs.split(",")]
    layers = [int(count) for count in args.layers.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            count: measure(
                checkpoint(Path(folder), count),
                seqs,
                steps=args.steps,
                repeat=args.repeat if count == layers[1] else 1,
            )
            for count in layers
        }
    result = {
        "torch": torch.__version__,
        "time": time_growth(runs[layers[1]], layers[1]),
        "memory": memory_growth(runs),
    }
    print(json.dumps(result))


def checkpoint(folder: Path, num_layers: int) -> str:
    arch = LlamaArch(
        vocab_size=32_000,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_layers=num_layers,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=2**16,
    )
    path = folder / f"layers_{num_layers}"
    save_checkpoint(llama(arch, dtype=torch.bfloat16), path)
    return str(path)


def measure(path: str, seqs: list[int], *, steps: int, repeat: int) -> dict[int, dict[str, float]]:
    """Median step_cpu_s and peak_mib for every length."""
    runs: dict[int, list[dict[str, Any]]] = {seq: [] for seq in seqs}
    for _ in range(repeat):
        for seq in seqs:
            command = [sys.executable, str(Path(__file__).with_name("bench_train.py"))]
            command += ["--checkpoint", path, "--seq", str(seq), "--steps", str(steps)]
            command += ["--compile", "off", "--activation-checkpointing", "full"]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            output = subprocess.run(
                command, check=True, capture_output=True, text=True, env=environment
            ).stdout
            runs[seq].append(json.loads(output.splitlines()[-1]))
            print(path.rpartition("/")[2], output.splitlines()[-1], flush=True)
    return {
        seq: {
            key: statistics.median(run[key] for run in group) for key in ("step_cpu_s", "peak_mib")
        }
        for seq, group in runs.items()
    }


def time_growth(runs: dict[int, dict[str, float]], num_layers: int) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    for seq, run in runs.items():
        attention = num_layers * attention_seconds(seq)
        rows.append(
            {
                "seq": seq,
                "step_cpu_s": run["step_cpu_s"],
                "ms_per_token": 1e3 * run["step_cpu_s"] / seq,
                "attention_ms_per_token": 1e3 * attention / seq,
            }
        )
        rest = [row["ms_per_token"] - row["attention_ms_per_token"] for row in rows]
        rows[-1]["excess"] = rest[-1] / rest[0] - 1
    return [{key: round(value, 4) for key, value in row.items()} for row in rows]


def memory_growth(runs: dict[int, dict[int, dict[str, float]]]) -> dict[str, Any]:
    """KiB per token of each number of layers, and the fit of those, beside a layer's input."""
    per_token, worst = {}, 0.0
    for count, by_seq in runs.items():
        seqs = np.array(list(by_seq), dtype=float)
        peaks = np.array([run["peak_mib"] for run in by_seq.values()])
        slope, intercept = np.polyfit(seqs, peaks, 1)
        worst = max(worst, float(np.max(np.abs(slope * seqs + intercept - peaks) / peaks)))
        per_token[count] = slope * 1024
    per_layer, constant = np.polyfit(list(per_token), list(per_token.values()), 1)
    return {
        "peak_mib": {
            count: {seq: run["peak_mib"] for seq, run in by_seq.items()}
            for count, by_seq in runs.items()
        },
        "kib_per_token": {count: round(value, 1) for count, value in per_token.items()},
        "worst_deviation_from_line": round(worst, 4),
        "kib_per_token_and_layer": round(float(per_layer), 2),
        "kib_of_a_layer_input": HIDDEN * 4 / 1024,
        "constant_kib_per_token": round(float(constant), 1),
    }


def attention_seconds(seq: int) -> float:
    """Two forward passes and a backward pass of one layer's attention, without projections."""
    q, k, v = (
        torch.randn(1, heads, seq, HEAD_DIM, requires_grad=True)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    torch.set_num_threads(1)
    times = []
    for _ in range(5):
        started = time.process_time()
        with torch.no_grad():
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        output = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        output.backward(torch.ones_like(output))
        times.append(time.process_time() - started)
    return statistics.median(times)


if __name__ == "__main__":
    main()
