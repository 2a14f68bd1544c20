"""Run directories as finetune leaves them, without training anything."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from report_pages import training_rows


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """make_run("name", rows, config) -> its directory"""

    def make(
        name: str,
        rows: Iterable[Mapping[str, Any]] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> Path:
        run = tmp_path / name
        run.mkdir(parents=True)
        lines = training_rows(20) if rows is None else rows
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
        (run / "config.yaml").write_text(yaml.safe_dump(dict(config or {})))
        return run

    return make
