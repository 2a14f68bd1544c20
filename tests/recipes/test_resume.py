"""A run that is killed, stopped or out of disk goes on as if nothing had happened."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora_builders.checkpoint.run_dir import find_start

SAVE_EVERY = 3
STEPS = 14
Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def runner() -> Iterator[Callable[[dict[str, Any]], dict[str, Any]]]:
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("run_and_kill.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def ask(task: dict[str, Any]) -> dict[str, Any]:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(task) + "\n")
        process.stdin.flush()
        answer: dict[str, Any] = json.loads(process.stdout.readline())
        return answer

    yield ask
    process.communicate(timeout=60)


@pytest.fixture(scope="module")
def finetune(runner: Any, checkpoint: Path, rows: Path) -> Run:
    """Packing, dropout and accumulation; 3 batches an epoch, so no epoch ends with a step."""

    def run(folder: Path, *overrides: str, signals: dict[int, int] | None = None) -> dict[str, Any]:
        argv = [
            "finetune",
            f"checkpoint.dir={checkpoint}",
            f"data.train={rows}",
            f"data.eval={rows}",
            "data.packing=best_fit",
            "data.max_seq_len=100",
            "method.dropout=0.1",
            f"training.max_steps={STEPS}",
            "training.batch_size=2",
            "training.grad_accumulation=2",
            "training.compute_dtype=float32",
            "training.eval_every=4",
            f"training.save_every={SAVE_EVERY}",
            "training.keep_last=2",
            "optimizer.lr=1e-2",
            f"output_dir={folder}",
            *overrides,
        ]
        return runner({"argv": argv, "watch": str(folder), "signals": signals or {}})

    return run


@pytest.fixture(scope="module")
def uninterrupted(
    finetune: Run, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    answer = finetune(folder)
    assert answer["code"] == 0
    return folder, answer["events"]


def curve(run: Path) -> list[tuple[Any, ...]]:
    """Every row of metrics.jsonl without what a clock measured."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    keys = ("step", "loss", "lr", "grad_norm", "target_tokens", "eval_loss", "eval_tokens")
    return [tuple(row.get(key) for key in keys) for row in rows]


def same_run(run: Path, expected: Path) -> None:
    """Losses and weights, bit for bit, and no other file than usual."""
    assert curve(run) == curve(expected)
    ours, theirs = (load_file(r / "adapter" / "adapter_model.safetensors") for r in (run, expected))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    names = [sorted(str(p.relative_to(r)) for p in r.rglob("*")) for r in (run, expected)]
    assert names[0] == names[1]


# ---- killed -------------------------------------------------------------------------------------


def kill_points(events: list[str], count: int) -> list[int]:
    """Anywhere in the run, and half of them inside a save."""
    draw = random.Random(count)
    saving = [number for number, name in enumerate(events) if ".partial" in name]
    assert len(saving) > 50
    points = draw.sample(saving, count // 2)
    return points + draw.sample(sorted(set(range(len(events))) - set(points)), count - len(points))


@pytest.mark.parametrize("count", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_bit_for_bit(
    finetune: Run, uninterrupted: tuple[Path, list[str]], tmp_path: Path, count: int
) -> None:
    whole, events = uninterrupted
    for point in kill_points(events, count):
        run = tmp_path / str(point)
        killed = finetune(run, signals={point: signal.SIGKILL})
        assert killed["code"] == -signal.SIGKILL, events[point]
        file = run / "metrics.jsonl"
        steps = [row[0] for row in curve(run) if row[1] is not None] if file.exists() else []
        if run.exists() and any(run.iterdir()):
            start = find_start(run, resume="auto", overwrite=False)
            assert start.step >= max(steps, default=0) - SAVE_EVERY, events[point]
            assert start.skipped == ()
        assert finetune(run, "training.resume=auto")["code"] == 0, events[point]
        same_run(run, whole)
        shutil.rmtree(run)
