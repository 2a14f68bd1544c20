"""Peak memory and time of loading a checkpoint as QLoRA; the last line printed is JSON.

usage: python scripts/bench_load.py CHECKPOINT [--rank 8] [--dtype bfloat16]

The bound is 1.25x the bytes of the finished model plus the largest tensor of the checkpoint.
Memory is resident memory (Linux): the peak while loading over what the process had before.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path

import torch

from qlora_builders import load_checkpoint
from qlora_builders.checkpoint.safetensors_io import find_tensors, read_tensor

MIB = 2**20


def memory_kib(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"no {field} in /proc/self/status; this script needs Linux")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    plan = [
        {"match": "layers.**", "kind": "qlora", "rank": args.rank, "alpha": 2 * args.rank},
    ]
    files = find_tensors(Path(args.checkpoint))
    largest = max(read_tensor(file, name).nbytes for name, file in files.items())

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = memory_kib("VmRSS")
    started = time.perf_counter()
    model = load_checkpoint(args.checkpoint, plan, dtype=getattr(torch, args.dtype))
    seconds = time.perf_counter() - started
    peak = (memory_kib("VmHWM") - before) * 1024
    after = (memory_kib("VmRSS") - before) * 1024

    model_bytes = sum(parameter.nbytes for parameter in model.parameters())
    bound = 1.25 * model_bytes + largest
    print(
        json.dumps(
            {
                "checkpoint": args.checkpoint,
                "load_s": round(seconds, 2),
                "model_mib": round(model_bytes / MIB, 1),
                "largest_tensor_mib": round(largest / MIB, 1),
                "resident_after_mib": round(after / MIB, 1),
                "load_peak_mib": round(peak / MIB, 1),
                "bound_mib": round(bound / MIB, 1),
                "within_bound": peak <= bound,
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
            }
        )
    )


if __name__ == "__main__":
    main()
