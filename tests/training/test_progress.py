from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qlora_builders.training import progress
from qlora_builders.training.loop import StepResult
from qlora_builders.training.progress import MetricsLog, ProgressReport, plot_losses, step_row

RESULT = StepResult(loss=1.25, grad_norm=0.5, target_tokens=100, tokens=1234)


def row(step: int) -> dict[str, Any]:
    return step_row(step, RESULT, lr=1e-3, seconds=1.0, memory=512.0)


def test_metrics_are_on_disk_line_by_line(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write(step=1, loss=2.5)
    assert json.loads(log.path.read_text()) == {"step": 1, "loss": 2.5}
    log.write(step=2, eval_loss=2.0)
    assert len(log.path.read_text().splitlines()) == 2


def test_plain_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    out = io.StringIO()
    with ProgressReport(6, Console(file=out, width=120)) as report:
        report.say("hello")
        for step in range(1, 7):
            report.step(row(step))
    lines = out.getvalue().splitlines()
    assert lines[0] == "hello"
    assert lines[1] == "step 1/6  loss 1.2500  lr 1.00e-03  1,234 tok/s  512 MiB  eta 20 s"
    assert [line.split()[1] for line in lines[1:]] == ["1/6", "4/6", "6/6"]


def test_a_bar_on_a_terminal() -> None:
    out = io.StringIO()
    with ProgressReport(2, Console(file=out, force_terminal=True, width=120)) as report:
        report.step(row(2))
    assert "loss 1.2500" in out.getvalue()
    assert "2/2" in out.getvalue()


def test_plot_shows_both_losses(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for step in range(1, 5):
        log.write(step=step, loss=1 / step)
    log.write(step=4, eval_loss=0.5)
    path = plot_losses(tmp_path)
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_plot_without_matplotlib_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'qlora-builders\[plot\]'"):
        plot_losses(tmp_path)
