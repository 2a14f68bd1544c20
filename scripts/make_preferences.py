"""Write the demo's pairs of answers: lists, as in its instruct rows, are preferred to sentences.

    python scripts/make_preferences.py [FOLDER]

The result is part of the package: qlora_builders/demo/preferences_*.jsonl.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from qlora_builders.config.shipped import demo_path

ROWS = {"train": 200, "eval": 40}


def pair(row: dict[str, str]) -> dict[str, str]:
    """An instruct row as a preference row."""
    lines = row["completion"].splitlines()
    order = dict(line.removeprefix("- ").split(": ", 1) for line in lines)
    sentence = "{customer} from {city} wants {quantity} {color} {item} by {day}."
    return {
        "prompt": row["prompt"],
        "chosen": row["completion"],
        "rejected": sentence.format(**order),
    }


def main(folder: Path) -> None:
    for name, count in ROWS.items():
        lines = demo_path(f"{name}.jsonl").read_text().splitlines()[:count]
        pairs = [json.dumps(pair(json.loads(line))) + "\n" for line in lines]
        (folder / f"preferences_{name}.jsonl").write_text("".join(pairs))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else demo_path(""))
