"""`qlora plan` beside uniform NF4 at the same bytes, on the demo base or a checkpoint of yours.

    python scripts/bench_plan.py [--bits 4.13 4.6] [--checkpoint DIR --train FILE --eval FILE]

The demo base is measured on text of the kind it was trained on, made anew with other seeds; FILEs
have `text` rows. Prints JSON: for every budget, what was measured of each plan, and the verdict.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from demo_text import base_rows

ROOT = Path(__file__).resolve().parent.parent
NUM_TEXTS = 400
SEEDS = {"train": 101, "eval": 102}  # the base was trained on seed 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bits", type=float, nargs="+", default=[4.13, 4.3, 4.6, 5.5])
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "qlora_builders/demo/base")
    parser.add_argument("--train", type=Path, help="text rows to calibrate on")
    parser.add_argument("--eval", type=Path, help="text rows held out")
    parser.add_argument("--max-rows", type=int, default=NUM_TEXTS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        files = {"train": args.train, "eval": args.eval}
        for name in [name for name, file in files.items() if file is None]:
            files[name] = work / f"{name}.jsonl"
            rows = base_rows(NUM_TEXTS, seed=SEEDS[name])
            files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
        common = [f"checkpoint.dir={args.checkpoint}", f"data.max_rows={args.max_rows}"]
        common += [f"data.{name}={file}" for name, file in files.items()]
        results = {bits: plan(bits, work / f"{bits}.yaml", common) for bits in args.bits}
    print(json.dumps(results, indent=2))


def plan(bits: float, output: Path, common: list[str]) -> dict[str, Any]:
    words = [f"bits={bits}", f"output={output}", "data=text", "data.max_seq_len=256"]
    command = [sys.executable, str(ROOT / "recipes" / "plan.py"), *words, *common]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    figures = json.loads(output.with_suffix(".json").read_text())
    return {key: figures[key] for key in ("verdict", "written", "comparison")}


if __name__ == "__main__":
    main()
