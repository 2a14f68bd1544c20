"""Loggers: the real packages where they are installed, and what holds for all of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from qlora_builders.config.instantiate import instantiate
from qlora_builders.training.loggers import Loggers, MetricsLog

PREFIX = "qlora_builders.training.loggers."


def make(name: str, run: Path, *, first_step: int = 0, **options: Any) -> Any:
    run.mkdir(exist_ok=True)
    node = {"component": PREFIX + name, **options}
    about = {"run_dir": run, "first_step": first_step, "config": {"training": {"seed": 3}}}
    return instantiate(node, "logger", kwargs=about, key="loggers[0]")


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


def test_all_loggers_hear_what_is_written(tmp_path: Path) -> None:
    first, second = Recorder(), Recorder()
    log = MetricsLog(tmp_path, loggers=Loggers([first, second]))
    log.write(step=3, loss=1.5)
    assert first.rows == second.rows == [(3, {"loss": 1.5})]
    assert json.loads(log.path.read_text()) == {"step": 3, "loss": 1.5}


def test_all_loggers_are_closed_whatever_one_does() -> None:
    first, second = Recorder(fails=True), Recorder()
    with pytest.raises(OSError, match="no network"):
        Loggers([first, second]).close()
    assert second.closed


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
