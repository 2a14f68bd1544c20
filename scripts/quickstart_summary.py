"""Compare the quickstart's three evaluations; exit code 1 if it did not work.

usage: python scripts/quickstart_summary.py RUN_DIR
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(run: Path) -> int:
    before, after, merged = (
        json.loads((run / f"{name}.json").read_text()) for name in ("before", "after", "merged")
    )
    rows = len(before["answers"])
    flipped = sum(
        not b["right"] and a["right"]
        for b, a in zip(before["answers"], after["answers"], strict=True)
    )
    fall = 1 - after["loss"] / before["loss"]
    drift = abs(merged["loss"] - after["loss"])
    print(f"eval loss {before['loss']:.4f} -> {after['loss']:.4f} ({fall:.0%} lower)")
    print(f"held-back prompts answered exactly: {before['right']} -> {after['right']} of {rows}")
    print(f"from wrong to right: {flipped} of {rows}")
    print(f"merged model: eval loss {merged['loss']:.4f}, {drift:.1e} from base + adapter")
    print(f"everything is in {run}: adapter/, merged/, metrics.jsonl, report.html")
    worked = fall >= 0.4 and flipped > rows / 2 and drift < 1e-3
    if not worked:
        print("this is not what the quickstart should give", file=sys.stderr)
    return 0 if worked else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
