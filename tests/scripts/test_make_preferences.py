"""The demo's pairs are what their script writes."""

from __future__ import annotations

import runpy
from pathlib import Path

from qlora_builders.config.shipped import demo_path

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_preferences.py"


def test_the_shipped_pairs_are_those_of_the_script(tmp_path: Path) -> None:
    runpy.run_path(str(SCRIPT))["main"](tmp_path)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["preferences_eval.jsonl", "preferences_train.jsonl"]
    for name in files:
        assert (tmp_path / name).read_bytes() == demo_path(name).read_bytes()
