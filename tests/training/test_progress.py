from __future__ import annotations

import io
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qlora_builders.console import table_console
from qlora_builders.errors import QLoRAError
from qlora_builders.training import loggers
from qlora_builders.training.loggers import MetricsLog, ProgressReport, step_row
from qlora_builders.training.step import StepResult

RESULT = StepResult(loss=1.25, grad_norm=0.5, target_tokens=100, tokens=1234)


def row(step: int) -> dict[str, Any]:
    return step_row(step, RESULT, lr=1e-3, seconds=1.0, memory=512.0)


def test_metrics_are_on_disk_line_by_line(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write(step=1, loss=2.5)
    assert json.loads(log.path.read_text()) == {"step": 1, "loss": 2.5}
    log.write(step=2, eval_loss=2.0)
    assert len(log.path.read_text().splitlines()) == 2


def test_a_resumed_run_keeps_the_rows_of_its_past(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for step in range(5):
        log.write(step=step, loss=float(step))
        log.write(step=step, eval_loss=float(step))
    log.sync()
    with log.path.open("a") as file:
        file.write('{"step": 5, "lo')  # killed here
    lines = log.path.read_text().splitlines()
    resumed = MetricsLog(tmp_path, step=3)
    assert resumed.path.read_text().splitlines() == lines[:8]
    assert (resumed.has_eval(3), resumed.has_eval(4)) == (True, False)
    (tmp_path / "other").mkdir()
    elsewhere = MetricsLog(tmp_path / "other", step=2, source=tmp_path)
    assert elsewhere.path.read_text().splitlines() == lines[:6]
    assert MetricsLog(tmp_path).path.read_text() == ""  # a new run
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "other"]


def test_a_power_cut_leaves_garbage_after_the_last_checkpoint_only(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write(step=1, loss=1.0)
    with log.path.open("ab") as file:
        file.write(bytes(100) + b"\n\xff\n")
    MetricsLog(tmp_path, step=1)
    assert json.loads(log.path.read_text()) == {"step": 1, "loss": 1.0}


@pytest.mark.parametrize(
    "row", ["3", "null", "[1]", '{"loss": 1}', '{"step": "2"}', '{"step": true}']
)
def test_what_is_no_row_of_a_step_ends_what_is_kept(tmp_path: Path, row: str) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(f'{{"step": 1, "loss": 2.0}}\n{row}\n{{"step": 2, "loss": 3.0}}\n')
    MetricsLog(tmp_path, step=2)
    assert json.loads(file.read_text()) == {"step": 1, "loss": 2.0}


def test_a_log_that_cannot_be_written_names_the_file(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.path.unlink()
    log.path.symlink_to("/dev/full")
    with pytest.raises(QLoRAError, match=r"metrics.jsonl: cannot be written: .*No space left"):
        log.write(step=1, loss=1.0)


def test_plain_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(loggers.time, "monotonic", lambda: float(next(clock)))
    out = io.StringIO()
    with ProgressReport(6, Console(file=out, width=120)) as report:
        report.say("hello")
        for step in range(1, 7):
            report.step(row(step))
    lines = out.getvalue().splitlines()
    assert lines[0] == "hello"
    assert lines[1] == "step 1/6  loss 1.2500  lr 1.00e-03  1,234 tok/s  512 MiB  eta 5 s"
    assert [line.split()[1] for line in lines[1:]] == ["1/6", "4/6", "6/6"]


def test_the_eta_counts_neither_what_came_before_nor_earlier_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first one has the time of its step alone; then what came between is counted too."""
    clock = iter((100.0, 120.0))
    monkeypatch.setattr(loggers.time, "monotonic", lambda: next(clock))
    out = io.StringIO()
    with ProgressReport(110, Console(file=out, width=120), steps_done=100) as report:
        report.step(row(101))
        report.step(row(105))
    assert [line.split("eta ")[1] for line in out.getvalue().splitlines()] == ["9 s", "25 s"]


def test_preferences_are_shown() -> None:
    out = io.StringIO()
    with ProgressReport(2, Console(file=out, width=120)) as report:
        report.step(row(1) | {"rewards/margins": 0.25, "rewards/accuracies": 0.5})
    assert "loss 1.2500  margin 0.250  accuracy 0.50  lr" in out.getvalue()


def test_tables_are_as_wide_as_the_terminal_or_as_the_environment_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert table_console().width == 140
    monkeypatch.setenv("COLUMNS", "90")
    assert table_console().width == 90


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, SystemExit])
def test_a_bar_on_a_terminal_that_gets_its_cursor_back(error: type[BaseException] | None) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    expected = pytest.raises(error) if error else nullcontext()
    with expected, ProgressReport(2, console, steps_done=1) as report:
        report.step(row(2))
        if error:
            raise error
    assert "loss 1.2500" in out.getvalue()
    assert "2/2" in out.getvalue()
    hidden, shown = out.getvalue().rfind("\x1b[?25l"), out.getvalue().rfind("\x1b[?25h")
    assert 0 <= hidden < shown
