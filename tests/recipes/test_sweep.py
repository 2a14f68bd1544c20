"""Sweeps through the command line: real jobs, one that fails, going on, and the table."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qlora_builders import cli
from qlora_builders.report import read_run
from qlora_builders.sweep import error_in


def words(checkpoint: Path, rows: Path, folder: Path, *more: str) -> list[str]:
    given = [f"checkpoint.dir={checkpoint}", f"data.eval={rows}", f"output_dir={folder}"]
    given += ["training.batch_size=4", "training.compute_dtype=float32"]
    return ["finetune", "--multirun", *given, *more]


def jobs_of(folder: Path) -> list[dict[str, Any]]:
    jobs: list[dict[str, Any]] = json.loads((folder / "sweep.json").read_text())["jobs"]
    return jobs


def test_a_sweep_with_failing_jobs_goes_on_where_it_stopped(
    checkpoint: Path, rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, later = tmp_path / "sweep", tmp_path / "later.jsonl"
    choices = [f"data.train={rows},{later}", "optimizer.lr=1e-3,1e-2", "training.max_steps=4"]
    command = words(checkpoint, rows, folder, *choices, "training.samples=2")
    assert cli.main(command) == 1
    captured = capfd.readouterr()
    assert "error: 2 of 4 jobs have not finished; the same command with training" in captured.err
    assert captured.err.count(f"{later}") >= 2
    assert f"compare: qlora report {folder}/*/ output={folder}/report.html" in captured.out
    first = jobs_of(folder)
    assert [job["status"] for job in first] == ["finished", "finished", "failed", "failed"]
    assert all(str(later) in job["error"] for job in first[2:])
    assert first[0]["figures"]["eval_loss"] < first[1]["figures"]["eval_loss"]
    assert first[0]["swept"]["optimizer.lr"] == "0.01"  # learns more in 4 steps
    assert first[0]["figures"]["exact_match"] is not None
    assert "exact match" in captured.out

    later.write_text(rows.read_text())
    assert cli.main(command) == 2
    assert "is not empty; choose another, go on with its sweep" in capfd.readouterr().err
    changed = [*command, "training.resume=auto", "training.max_steps=5"]
    assert cli.main(changed) == 2
    assert capfd.readouterr().err.count("with another config: training.max_steps=5, was 4") == 2
    assert cli.main([*command, "training.resume=auto"]) == 0
    assert capfd.readouterr().out.count("was finished before") == 2
    second = {job["name"]: job for job in jobs_of(folder)}
    assert {job["status"] for job in second.values()} == {"finished"}
    assert all(second[job["name"]]["seconds"] == job["seconds"] for job in first[:2])
    check_files(folder, second)
    runs = [f"{path}/" for path in folder.iterdir() if path.is_dir()]
    assert cli.main(["report", *runs, f"output={folder / 'report.html'}"]) == 0


def check_files(folder: Path, jobs: dict[str, dict[str, Any]]) -> None:
    """Every job is a run of its own, and both files say what its metrics say."""
    table = list(csv.DictReader((folder / "sweep.csv").read_text().splitlines()))
    assert [row["path"] for row in table] == [job["path"] for job in jobs.values()]
    losses = [float(row["eval_loss"]) for row in table]
    assert losses == sorted(losses)
    for row, (name, job) in zip(table, jobs.items(), strict=True):
        run = read_run(folder / name)
        assert run.config["optimizer.lr"] == float(job["swept"]["optimizer.lr"])
        assert run.metrics["eval_loss"][1][-1] == job["figures"]["eval_loss"]
        assert row["data.train"] == run.config["data.train"] == job["swept"]["data.train"]
        assert run.metrics["loss"][0] == [1, 2, 3, 4]
        assert job["seconds"] > 0


def test_ctrl_c_stops_the_job_with_a_checkpoint_and_starts_no_other(
    checkpoint: Path, rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sweep"
    more = [f"data.train={rows}", "training.seed=0,1", "training.max_steps=150"]
    command = words(checkpoint, rows, folder, *more)
    process = subprocess.Popen(
        [sys.executable, "-m", "qlora_builders.cli", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = folder / "seed_0" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and '"loss"' in metrics.read_text()):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err.endswith("2 of 2 jobs have not finished; the same command with "
                        "training.resume=auto goes on\n")  # fmt: skip
    assert list(folder.glob("seed_0/checkpoints/step_*"))
    assert not (folder / "seed_1").exists()
    jobs = {job["name"]: job for job in jobs_of(folder)}
    assert jobs["seed_0"]["status"].startswith("stopped after step ")
    assert jobs["seed_1"]["status"] == "not started"
    assert cli.main([*command, "training.resume=auto"]) == 0
    assert "resumed after step " in capfd.readouterr().out
    for seed in (0, 1):
        assert read_run(folder / f"seed_{seed}").metrics["loss"][0] == [*range(1, 151)]


def test_evaluate_sweeps(
    checkpoint: Path, rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sweep"
    command = ["evaluate", "--multirun", f"checkpoint.dir={checkpoint}", f"data.eval={rows}"]
    command += ["compute_dtype=float32", "data.max_rows=2,3", f"output={folder}.json"]
    assert cli.main(command) == 0
    for job in jobs_of(folder):
        result = json.loads((folder / f"{job['name']}.json").read_text())
        assert result["examples"] == int(job["swept"]["data.max_rows"])
        assert job["figures"]["eval_loss"] == result["loss"]
        assert job["figures"]["perplexity"] == result["perplexity"]
    assert "perplexity" in capfd.readouterr().out
    assert cli.main(command) == 2
    assert f"{folder} is not empty; name another folder with output=" in capfd.readouterr().err


def test_a_dry_run_lists_the_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    command = ["finetune", "--multirun", "--nproc-per-node", "2", "training.seed=0,1"]
    command += ["--config-dir=mine", "--allow", "a", "--allow", "b", "--dry-run"]
    assert cli.main([*command, "output_dir=sweep"]) == 0
    options = "--nproc-per-node=2 --config-dir mine --allow a --allow b"
    assert capsys.readouterr().out.splitlines() == [
        "nothing is wrong with the configs of these 2 jobs:",
        *(
            f"qlora finetune {options} training.seed={seed} output_dir=sweep/seed_{seed}"
            for seed in (0, 1)
        ),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_folder_of_something_else_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").touch()
    command = ["finetune", "--multirun", "training.seed=0,1", f"output_dir={tmp_path}"]
    for more in ("overwrite=true", "training.resume=auto"):
        assert cli.main([*command, more]) == 2
        assert f"output_dir={tmp_path} holds no sweep; {more.partition('=')[0]}" in (
            capsys.readouterr().err
        )
    (tmp_path / "sweep.json").write_text('{"jobs": [{"name": 1}]}')
    assert cli.main([*command, "training.resume=auto"]) == 2
    assert f"{tmp_path / 'sweep.json'} cannot be read: " in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    assert cli.main(command) == 2
    assert "--multirun starts its processes itself" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "sweep.json"]


@pytest.mark.parametrize(
    ("stderr", "code", "error"),
    [
        ("warning: a\nerror: b\nerror: c\n", 2, "b; c"),
        ("Traceback (most recent call last):\n  f()\nRuntimeError: d\n", 1, "RuntimeError: d"),
        ("", -9, "killed by SIGKILL"),
        ("", 1, "exit code 1"),
        ("warning: a\n", 0, ""),
        ("interrupted\n", 130, ""),
    ],
)
def test_what_is_said_of_the_end_of_a_job(stderr: str, code: int, error: str) -> None:
    assert error_in(stderr, code) == error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "swept", "more"),
    [
        ("dpo", "dpo.beta=0.1,0.3", ["experiment=demo_dpo", "training.max_steps=2"]),
        ("plan", "bits=4.3,4.6", ["calibration_tokens=512", "data.max_rows=20"]),
        ("finetune", "training.seed=0,1", ["--nproc-per-node=2", "training.max_steps=2"]),
    ],
)
def test_other_verbs_and_several_processes(
    verb: str, swept: str, more: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = "output=p.yaml" if verb == "plan" else "output_dir=p"
    path = path.replace("=", f"={tmp_path}/")
    assert cli.main([verb, "--multirun", swept, *more, path]) == 0
    jobs = jobs_of(tmp_path / "p")
    assert [job["status"] for job in jobs] == ["finished"] * 2
    assert all(job["figures"]["eval_loss"] > 0 for job in jobs)
    if verb == "plan":
        assert {"perplexity", "KL", "bits"} <= {*capfd.readouterr().out.split()}
