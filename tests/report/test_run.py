"""What is read of a run directory, and what is left out."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_builders.errors import ConfigError
from qlora_builders.report import final_figures, read_run

MakeRun = Callable[..., Path]


def test_metrics_are_series_over_steps(make_run: MakeRun) -> None:
    rows = [
        {"step": 2, "loss": 2.0},
        {"step": 1, "loss": 3.0},
        {"step": 2, "eval_loss": 1.5},
        {"step": 2, "loss": 2.5},  # a resumed run that did not remove its old row
    ]
    run = read_run(make_run("run", rows))
    assert run.metrics == {"loss": ([1, 2], [3.0, 2.5]), "eval_loss": ([2], [1.5])}
    assert run.last_step == 2


def test_what_is_no_number_is_left_out(make_run: MakeRun) -> None:
    rows = [
        {"step": 1, "loss": "3", "note": "x", "flag": True, "list": [1], "gone": None},
        {"step": "2", "loss": 1.0},
        {"step": True, "loss": 1.0},
        {"step": -1, "loss": 1.0},
        {"step": 10**400, "loss": 1.0},
        {"loss": 1.0},
    ]
    path = make_run("run", rows)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('[1, 2]\n"text"\n17\nnull\n')
        file.write('{"step": 3, "loss": NaN, "big": 1e999, "huge": 1' + "0" * 400 + "}\n")
        file.write('{"step": 4, "loss": 1.0}\n{"step": 5, "lo')  # being written
    run = read_run(path)
    assert set(run.metrics) == {"loss", "big", "huge"}
    steps, values = run.metrics["loss"]
    assert steps == [3, 4]
    assert math.isnan(values[0])
    assert values[1] == 1.0
    assert math.isnan(run.metrics["big"][1][0])
    assert math.isnan(run.metrics["huge"][1][0])


def test_a_deeply_nested_line_ends_the_file(make_run: MakeRun) -> None:
    path = make_run("run", [{"step": 1, "loss": 1.0}])
    with (path / "metrics.jsonl").open("a") as file:
        file.write("[" * 100_000 + "\n")
    assert read_run(path).last_step == 1


def test_config_is_flat_and_not_resolved(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    config = {"training": {"seed": 1}, "tokenizer": {"path": "${oc.env:SECRET}"}, "train": []}
    run = read_run(make_run("run", config=config))
    assert run.config == {
        "training.seed": 1,
        "tokenizer.path": "${oc.env:SECRET}",
        "train": [],
    }


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("a: &a [x]\nb: [*a, *a]\n", "it has aliases"),
        ("a: [\n", "expected the node content"),
        ("a: " + "[" * 5000, "recursion"),
        ("!!python/object/apply:os.system [echo]", "could not determine a constructor"),
        ("#" * (2**20 + 1), "larger than 1 MiB"),
        ("- a list\n", None),
    ],
)
def test_a_bad_config_is_a_note(make_run: MakeRun, text: str, note: str | None) -> None:
    path = make_run("run")
    (path / "config.yaml").write_text(text)
    run = read_run(path)
    assert run.config == {}
    if note is None:
        assert run.notes == []
    else:
        assert note in run.notes[0]
        assert run.notes[0].startswith("config.yaml cannot be read")


def test_pipes_and_missing_files_are_not_waited_for(make_run: MakeRun) -> None:
    path = make_run("run")
    os.mkfifo(path / "samples.jsonl")
    (path / "metrics.jsonl").unlink()
    os.mkfifo(path / "metrics.jsonl")
    run = read_run(path)
    assert run.metrics == {}
    assert run.samples == []


def test_states(make_run: MakeRun) -> None:
    path = make_run("run")
    assert read_run(path).status == "stopped after step 20"
    about = [{"first_step": 0, "total_steps": 50}, {"first_step": 15, "total_steps": 50}]
    (path / "environment.jsonl").write_text("".join(json.dumps(row) + "\n" for row in about))
    run = read_run(path)
    assert run.status == "stopped after step 20 of 50"
    assert run.resumed_at() == [15]
    (path / "adapter").mkdir()
    assert read_run(path).status == "stopped after step 20 of 50"  # the result of a shorter run
    about[1]["total_steps"] = 20
    (path / "environment.jsonl").write_text("".join(json.dumps(row) + "\n" for row in about))
    assert read_run(path).status == "finished, step 20 of 20"
    assert read_run(make_run("new", [])).status == "stopped before the first step"


def test_a_run_is_going_while_a_process_holds_it(make_run: MakeRun) -> None:
    path = make_run("run")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        assert read_run(path).status == "running, step 20"
    finally:
        os.close(descriptor)
    assert not read_run(path).is_going


def test_the_base_is_looked_for_where_the_run_started(make_run: MakeRun, tmp_path: Path) -> None:
    path = make_run("run", config={"checkpoint": {"dir": "models/base"}})
    assert read_run(path).base() is None
    (tmp_path / "models" / "base").mkdir(parents=True)
    (path / "environment.jsonl").write_text(json.dumps({"directory": str(tmp_path)}) + "\n")
    assert read_run(path).base() == tmp_path / "models" / "base"


def test_other_folders_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError, match=r"is no run directory: it has neither metrics.jsonl"):
            read_run(path)


def test_figures_are_of_what_is_finite(make_run: MakeRun) -> None:
    rows = [{"step": i, "loss": float(i), "tokens_per_s": float(i % 3)} for i in range(1, 13)]
    evals = [{"step": i, "eval_loss": loss} for i, loss in ((4, 2.0), (8, 1.0), (12, 1.5))]
    path = make_run("run", [*rows, *evals, {"step": 13, "loss": math.nan, "step_s": math.inf}])
    answers = [{"step": 0, "right": True}, {"step": 12, "right": True}, {"step": 12}]
    (path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    assert final_figures(read_run(path)) == {
        "loss": 7.5,  # of the last ten: 3 to 12
        "eval_loss": 1.5,
        "best_eval_loss": 1.0,
        "best_eval_step": 8,
        "tokens_per_s": 1.0,
        "exact_match": 0.5,
    }
    assert final_figures(read_run(make_run("new", []))) == {}
