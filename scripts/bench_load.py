"""Time and peak memory of loading a checkpoint as QLoRA, of reloading it from our own NF4 layout,
and of saving the adapter; the last line printed is JSON.

usage: python scripts/bench_load.py CHECKPOINT [--rank 8] [--dtype bfloat16] [--native DIR]

Each load runs in a process of its own, so that its peak is its own. DIR keeps the NF4 copy for the
next run; without it the copy is made anew in a temporary folder. Memory is resident memory (Linux):
the peak over what the process had before. The bound for `hf` is 1.25x the bytes of the finished
model plus the largest tensor of the checkpoint.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from qlora_builders import load_checkpoint, save_adapter, save_checkpoint
from qlora_builders.checkpoint import read_tensors
from qlora_builders.modules import CausalLM

MIB = 2**20


def memory_kib(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"no {field} in /proc/self/status; this script needs Linux")


class Measured:
    """Seconds, and MiB over the memory before: at the peak, and at the end."""

    def __enter__(self) -> Measured:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        self.before = memory_kib("VmRSS")
        self.started = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self.started
        self.peak = (memory_kib("VmHWM") - self.before) / 1024
        self.after = (memory_kib("VmRSS") - self.before) / 1024


def load(path: Path, rank: int, dtype: str) -> tuple[CausalLM, dict[str, Any]]:
    plan = [{"match": "layers.**", "kind": "qlora", "rank": rank, "alpha": 2 * rank}]
    with Measured() as measured:
        model = load_checkpoint(path, plan, dtype=getattr(torch, dtype))
    return model, {
        "load_s": round(measured.seconds, 3),
        "load_peak_mib": round(measured.peak, 1),
        "resident_after_mib": round(measured.after, 1),
    }


def save(model: CausalLM) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, Measured() as measured:
        save_adapter(model, Path(folder) / "adapter")
    return {
        "adapter_save_s": round(measured.seconds, 3),
        "adapter_save_peak_mib": round(measured.peak, 1),
    }


def in_a_process_of_its_own(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, str(path), "--rank", str(args.rank), "--only"]
    done = subprocess.run(
        [*command, "--dtype", args.dtype], stdout=subprocess.PIPE, text=True, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def write_native(source: str, target: Path, dtype: str) -> None:
    plan = [{"match": "layers.**", "kind": "frozen_nf4"}]
    save_checkpoint(
        load_checkpoint(source, plan, dtype=getattr(torch, dtype)), target, format="nf4"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--native")
    parser.add_argument("--only", action="store_true", help="load this one in this process")
    args = parser.parse_args()
    if args.only:
        model, result = load(Path(args.checkpoint), args.rank, args.dtype)
        result["model_mib"] = round(sum(p.nbytes for p in model.parameters()) / MIB, 1)
        print(json.dumps(result | save(model)))
        return
    with tempfile.TemporaryDirectory() as folder:
        native = Path(args.native or f"{folder}/nf4")
        if not native.exists():
            write_native(args.checkpoint, native, args.dtype)
        results = {
            "hf": in_a_process_of_its_own(Path(args.checkpoint), args),
            "nf4": in_a_process_of_its_own(native, args),
        }
    largest = max(tensor.nbytes for tensor in read_tensors(args.checkpoint).values()) / MIB
    bound = 1.25 * results["hf"]["model_mib"] + largest
    print(
        json.dumps(
            {
                "checkpoint": args.checkpoint,
                **results,
                "largest_tensor_mib": round(largest, 1),
                "bound_mib": round(bound, 1),
                "within_bound": results["hf"]["load_peak_mib"] <= bound,
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
            }
        )
    )


if __name__ == "__main__":
    main()
