"""`qlora finetune --nproc-per-node`: a rank that dies, restarts, and what is said about it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora_builders.cli import main


def start(*arguments: str, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "qlora_builders.cli", "finetune", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)


def workers(launcher: subprocess.Popen[str]) -> list[int]:
    """Processes of the ranks, as the kernel lists them."""
    file = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    return [int(pid) for pid in file.read_text().split()] if launcher.poll() is None else []


def num_rows(run: Path) -> int:
    file = run / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.is_file() else 0


def wait_for_rows(run: Path, count: int, launcher: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while num_rows(run) < count and launcher.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)


def losses(run: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"]) for row in lines if "loss" in row]


def test_mistakes_are_reported_once_before_anything_starts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["finetune", "--nproc-per-node", "2", "training.max_step=3"]) == 2
    assert capsys.readouterr().err.count("training.max_steps") == 1
    assert main(["finetune", "--nproc-per-node", "two"]) == 2
    assert "--nproc-per-node" in capsys.readouterr().err
    assert main(["evaluate", "--nproc-per-node", "2"]) == 2
    assert "qlora evaluate runs in one process; only finetune and dpo" in capsys.readouterr().err


@pytest.mark.slow
def test_an_error_of_all_ranks_is_said_once(overrides: list[str], tmp_path: Path) -> None:
    shard = "distributed.shard=3"
    done = start("--nproc-per-node=2", *overrides, f"output_dir={tmp_path / 'run'}", shard)
    _, err = done.communicate(timeout=300)
    assert done.returncode == 2
    assert err == "error: distributed.shard=3 does not divide the 2 processes of this run\n"


@pytest.mark.slow
def test_a_dead_rank_takes_the_job_down_with_one_message(
    overrides: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    launcher = start("--nproc-per-node=2", *overrides, f"output_dir={run}")
    wait_for_rows(run, 4, launcher)
    os.kill(workers(launcher)[1], signal.SIGKILL)
    _, err = launcher.communicate(timeout=300)
    assert launcher.returncode == 1
    (line,) = err.splitlines()
    assert line.startswith("error: rank 1 was killed by SIGKILL (out of memory?)")
    assert "no checkpoint was written, so there is nothing to go on from; start again" in line


@pytest.mark.slow
def test_killed_ranks_are_started_again_and_the_curve_is_the_same(
    overrides: list[str], tmp_path: Path
) -> None:
    options = [*overrides, "training.save_every=2"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    undisturbed = start("--nproc-per-node=2", *options, f"output_dir={whole}")
    undisturbed.communicate(timeout=300)
    assert undisturbed.returncode == 0
    launcher = start("--nproc-per-node=2", "--max-restarts=5", *options, f"output_dir={run}")
    draw = random.Random(0)
    for row in sorted(draw.sample(range(1, 20), 5)):
        wait_for_rows(run, row, launcher)
        time.sleep(draw.random() * 0.3)
        alive = workers(launcher)
        os.kill(draw.choice(alive), signal.SIGKILL)
        while set(workers(launcher)) & set(alive) and launcher.poll() is None:
            time.sleep(0.05)
        while not workers(launcher) and launcher.poll() is None:
            time.sleep(0.05)
    out, err = launcher.communicate(timeout=600)
    assert launcher.returncode == 0, err
    assert losses(run) == losses(whole)
    assert "resumed after step" in out
