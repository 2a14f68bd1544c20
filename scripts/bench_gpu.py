"""Everything that needs a GPU in one call: the gpu-marked tests, NF4 kernels, a whole 8B model.

usage: python scripts/bench_gpu.py [--out scripts/results/gpu_YYYY-MM-DD.json]
           [--skip tests nf4 model]

Writes the raw results with device, versions and command, and prints them. Exit code 1 if a test
failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
SHAPES_8B = "4096x4096,14336x4096,4096x14336,1024x4096"
SHAPES_70B = "8192x8192,28672x8192,8192x28672,1024x8192"


def main() -> int:
    parser = argparse.ArgumentParser()
    today = datetime.date.today().isoformat()
    parser.add_argument("--out", type=Path, default=ROOT / "scripts/results" / f"gpu_{today}.json")
    parser.add_argument("--skip", nargs="*", default=[], choices=("tests", "nf4", "model"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"no GPU: torch {torch.__version__} sees no CUDA device", file=sys.stderr)
        return 2
    results: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "date": today,
        "device": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "copy_gb_per_s": copy_bandwidth(),
    }
    if "tests" not in args.skip:
        tests = run("-m", "pytest", "-q", "-m", "gpu", "tests")
        results["tests"] = {"exit_code": tests.returncode, "summary": last_line(tests.stdout)}
    if "nf4" not in args.skip:
        results["nf4"] = last_json(
            "bench_nf4.py", "--device", "cuda", "--shapes", f"{SHAPES_8B},{SHAPES_70B}"
        )
    if "model" not in args.skip:
        results["model"] = last_json("bench_model.py", "--longest", "--peft")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))
    return int(results.get("tests", {}).get("exit_code", 0) != 0)


def copy_bandwidth() -> float:
    """GB/s read and written by copying 2 GiB: the ceiling for decoding."""
    source = torch.empty(2**30, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    target.copy_(source)
    events[0].record()
    for _ in range(10):
        target.copy_(source)
    events[1].record()
    torch.cuda.synchronize()
    seconds = events[0].elapsed_time(events[1]) / 1e3 / 10
    return round(2 * source.nbytes / seconds / 1e9, 1)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)


def last_json(script: str, *words: str) -> Any:
    """What a benchmark prints last, or the end of what went wrong."""
    done = run(f"scripts/{script}", *words)
    if done.returncode != 0:
        return {"error": done.stderr[-2000:]}
    return json.loads(last_line(done.stdout))


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else ""


if __name__ == "__main__":
    sys.exit(main())
