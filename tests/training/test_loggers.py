"""What a run logs: its rows, progress on a terminal, the packages of loggers."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from qlora_builders.config.instantiate import instantiate
from qlora_builders.console import table_console
from qlora_builders.errors import QLoRAError
from qlora_builders.training import loggers
from qlora_builders.training.loggers import MetricsLog, ProgressReport, step_row
from qlora_builders.training.step import StepResult

PREFIX = "qlora_builders.training.loggers."


def make(name: str, run: Path, *, first_step: int = 0, **options: Any) -> Any:
    run.mkdir(exist_ok=True)
    node = {"component": PREFIX + name, **options}
    about = {"run_dir": run, "first_step": first_step, "config": {"training": {"seed": 3}}}
    return instantiate(node, "logger", kwargs=about, key="loggers[0]")


RESULT = StepResult(loss=1.25, grad_norm=0.5, target_tokens=100, tokens=1234)


def row(step: int) -> dict[str, Any]:
    return step_row(step, RESULT, lr=1e-3, seconds=1.0, memory=512.0)


class Recorder:
    def __init__(self, fails: bool = False) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.closed = False
        self.fails = fails

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.rows.append((step, dict(values)))

    def close(self) -> None:
        self.closed = True
        if self.fails:
            raise OSError("no network")


def test_all_loggers_hear_what_is_written_and_are_closed(tmp_path: Path) -> None:
    loggers = [Recorder(), Recorder(fails=True), Recorder()]
    log = MetricsLog(tmp_path, loggers=loggers)
    log.write(step=3, loss=1.5)
    assert all(logger.rows == [(3, {"loss": 1.5})] for logger in loggers)
    assert json.loads(log.path.read_text()) == {"step": 3, "loss": 1.5}
    with pytest.raises(OSError, match="no network"):
        log.close()
    assert all(logger.closed for logger in loggers)


@pytest.mark.parametrize(
    ("name", "package"), [("TensorBoardLogger", "tensorboard"), ("WandbLogger", "wandb")]
)
def test_a_missing_package_names_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"pip install 'qlora-builders\[{package}\]'"):
        make(name, tmp_path)


def test_tensorboard_events_can_be_read_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = make("TensorBoardLogger", tmp_path)
    logger.close()  # nothing logged, nothing written
    assert list(tmp_path.iterdir()) == []
    for first_step, last_step in ((0, 4), (2, 5)):  # killed after step 4, resumed after step 2
        logger = make("TensorBoardLogger", tmp_path, first_step=first_step)
        for step in range(first_step + 1, last_step + 1):
            logger.log(step, {"loss": 10.0 * first_step + step, "lr": 0.5})
        logger.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "lr"}
    points = [(event.step, event.value) for event in events.Scalars("loss")]
    assert points == [(1, 1), (2, 2), (3, 23), (4, 24), (5, 25)]


class FakeWandb(ModuleType):
    """What of wandb's interface the logger uses, written down."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: list[tuple[dict[str, Any], list[Any]]] = []  # options of init, what was called

    Settings = staticmethod(lambda *, console, disable_git, disable_code: console)

    def init(
        self, *, dir: str, id: str, resume: str, settings: str, project: str | None,
        entity: str | None, name: str | None, mode: str | None, config: dict[str, Any],
    ) -> Any:  # fmt: skip
        calls: list[Any] = []
        self.runs.append(({"dir": dir, "id": id, "name": name, "mode": mode}, calls))
        return SimpleNamespace(
            log=lambda data, step: calls.append((step, data)),
            finish=lambda: calls.append("finished"),
        )


def test_wandb_keeps_the_id_of_a_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run = tmp_path / "run"
    make("WandbLogger", run).close()  # nothing logged, nothing opened
    assert fake.runs == []
    for first_step in (0, 1, 0):
        logger = make("WandbLogger", run, first_step=first_step, mode="offline", project="p")
        logger.log(first_step + 1, {"loss": 1.5})
        logger.close()
    ids = [options["id"] for options, _ in fake.runs]
    assert ids[0] == ids[1] != ids[2] == (run / "wandb_run_id").read_text()  # then a new run
    assert fake.runs[1][0] == {"dir": str(run), "id": ids[0], "name": "run", "mode": "offline"}
    assert [calls for _, calls in fake.runs] == [
        [(step, {"loss": 1.5}), "finished"] for step in (1, 2, 1)
    ]


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
