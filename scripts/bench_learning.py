"""What the demo task is learned to, by QLoRA and by LoRA on the 16-bit base; last line JSON.

usage: python scripts/bench_learning.py [--seeds 0,1,2] [--steps 30,60] [--rows 100]

A run of `experiment=demo_qlora` for every method, number of steps and seed (of adapters, data order
and generators), then loss and exact match on rows that were held out: right answers of `--rows`.
LoRA's base is bfloat16, QLoRA's the same in NF4. `learns_as_well` says whether QLoRA's mean is
at least LoRA's less the spread of the seeds, LoRA's and QLoRA's together (largest less smallest).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

METHODS = ("lora", "qlora")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", default="30,60")
    parser.add_argument("--rows", type=int, default=100)
    args = parser.parse_args()
    table = []
    for steps in args.steps.split(","):
        results: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
        for seed in args.seeds.split(","):
            for method in METHODS:
                results[method].append(run(method, int(steps), int(seed), args.rows))
                print(steps, seed, method, results[method][-1], flush=True)
        table.append({"steps": int(steps), **compare(results)})
    print(json.dumps({"rows": args.rows, "seeds": args.seeds, "results": table}))


def run(method: str, steps: int, seed: int, rows: int) -> dict[str, Any]:
    """Loss and right answers of a finished run."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        finetune = ["finetune", "experiment=demo_qlora", f"method={method}"]
        finetune += [f"training.max_steps={steps}", "training.eval_every=null"]
        finetune += [f"training.seed={seed}", f"output_dir={folder}/run"]
        evaluate = ["evaluate", f"adapter.path={folder}/run/adapter"]
        evaluate += [f"exact_match={rows}", f"output={output}"]
        for words in (finetune, evaluate):
            command = [sys.executable, "-m", "qlora_builders.cli", *words]
            subprocess.run(command, check=True, capture_output=True)
        measured = json.loads(output.read_text())
        return {"loss": round(measured["loss"], 4), "right": measured["right"]}


def compare(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    rights = {method: [r["right"] for r in rows] for method, rows in results.items()}
    spread = sum(max(right) - min(right) for right in rights.values())
    mean = {method: statistics.mean(right) for method, right in rights.items()}
    return {
        "right": rights,
        "loss": {method: [r["loss"] for r in rows] for method, rows in results.items()},
        "mean_right": {method: round(value, 1) for method, value in mean.items()},
        "learns_as_well": mean["qlora"] >= mean["lora"] - spread,
    }


if __name__ == "__main__":
    main()
