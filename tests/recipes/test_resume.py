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
from recipe_runs import same_adapter

from qlora_builders.files.folders import write_manifest
from qlora_builders.runs.folder import find_start

SAVE_EVERY = 3
STEPS = 11
Run = Callable[..., dict[str, Any]]
Whole = tuple[Path, list[str]]  # a run, and its events


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

    def run(folder: Path, *overrides: str, signals: dict[str, int] | None = None) -> dict[str, Any]:
        argv = ["finetune", f"checkpoint.dir={checkpoint}", f"data.train={rows}"]
        argv += [f"data.eval={rows}", "data.packing=best_fit", "data.max_seq_len=100"]
        argv += ["method.dropout=0.1", f"training.max_steps={STEPS}", "training.batch_size=2"]
        argv += ["training.grad_accumulation=2", "training.compute_dtype=float32"]
        argv += ["training.eval_every=4", f"training.save_every={SAVE_EVERY}"]
        argv += ["training.keep_last=2", "optimizer.lr=1e-2", f"output_dir={folder}", *overrides]
        return runner({"argv": argv, "watch": str(folder), "signals": signals or {}})

    return run


@pytest.fixture(scope="module")
def uninterrupted(finetune: Run, tmp_path_factory: pytest.TempPathFactory) -> Whole:
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
    assert same_adapter(run, expected)
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


@pytest.mark.parametrize("count", [2, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize("in_background", [False, True])
def test_a_killed_run_resumes_bit_for_bit(
    finetune: Run, uninterrupted: Whole, tmp_path: Path, count: int, in_background: bool
) -> None:
    whole, events = uninterrupted
    option = f"training.async_save={str(in_background).lower()}"
    lost = SAVE_EVERY * (2 if in_background else 1)  # one may be on its way
    for point in kill_points(events, count):
        run = tmp_path / str(point)
        killed = finetune(run, option, signals={f"event {point}": signal.SIGKILL})
        assert killed["code"] == -signal.SIGKILL, events[point]
        file = run / "metrics.jsonl"
        steps = [row[0] for row in curve(run) if row[1] is not None] if file.exists() else []
        if run.exists() and any(run.iterdir()):
            start = find_start(run, resume="auto", overwrite=False)
            assert start.step >= max(steps, default=0) - lost, events[point]
            assert not any("damaged" in line for line in start.messages)
        assert finetune(run, option, "training.resume=auto")["code"] == 0, events[point]
        same_run(run, whole)
        shutil.rmtree(run)


def test_a_resumed_run_can_be_killed_again(
    finetune: Run, uninterrupted: Whole, tmp_path: Path
) -> None:
    """Each process does four steps, loses one of them, and ends while it does the fifth."""
    run, kill = tmp_path / "run", {"optimizer 4": int(signal.SIGKILL)}
    codes = [finetune(run, "training.resume=auto", signals=kill)["code"] for _ in range(4)]
    assert codes == [-signal.SIGKILL] * 3 + [0]
    same_run(run, uninterrupted[0])


# ---- stopped ------------------------------------------------------------------------------------


def first_event(events: list[str], name: str, start: int) -> int:
    return next(n for n, event in enumerate(events) if n >= start and event.startswith(name))


@pytest.mark.parametrize(
    ("signals", "where", "code", "step"),
    [
        (["SIGTERM"], "step", 0, 5),
        (["SIGINT"], "evaluation", 130, 4),
        (["SIGTERM"], "save", 0, 6),
        (["SIGTERM", "SIGINT"], "save", 130, 3),
    ],
)
def test_a_stopped_run_resumes_bit_for_bit(
    finetune: Run,
    uninterrupted: Whole,
    tmp_path: Path,
    signals: list[str],
    where: str,
    code: int,
    step: int,
) -> None:
    """A stop during an evaluation or a save is noticed before the next step. A second signal leaves
    a save at once, and nothing half-written."""
    whole, events = uninterrupted
    updates = [n for n, event in enumerate(events) if event == "optimizer"]
    point, last = {
        "step": (updates[4] - 1, 5),  # a forward pass of step 5
        "evaluation": (first_event(events, "forward", updates[3]), 4),  # after step 4
        "save": (first_event(events, "fsync", updates[5]), 6),  # of step 6
    }[where]
    run = tmp_path / "run"
    sent = {f"event {point + 2 * n}": signal.Signals[name] for n, name in enumerate(signals)}
    answer = finetune(run, signals=sent)
    assert answer["code"] == code
    assert len(signals) == 1 or "interrupted" in answer["output"]
    assert find_start(run, resume="auto", overwrite=False).step == step
    assert max(row[0] for row in curve(run)) == last
    assert all(path.name.startswith("step_") for path in (run / "checkpoints").iterdir())
    assert not (run / "adapter").exists()
    assert finetune(run, "training.resume=auto")["code"] == 0
    same_run(run, whole)


def test_a_signal_before_the_first_step_just_ends_the_run(finetune: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert finetune(run, signals={"event 0": signal.SIGINT})["code"] == 130
    assert finetune(run, "training.resume=auto", signals={"event 0": signal.SIGTERM})["code"] in (
        0,
        -15,
    )
    assert not (run / "checkpoints").exists()


# ---- resumed otherwise --------------------------------------------------------------------------


def test_a_run_that_was_stopped_after_its_last_step_only_has_to_be_finished(
    finetune: Run, uninterrupted: Whole, tmp_path: Path
) -> None:
    run, expected = tmp_path / "run", tmp_path / "expected"
    assert finetune(run, signals={f"optimizer {STEPS - 1}": signal.SIGTERM})["code"] == 0
    assert not (run / "adapter").exists()
    answer = finetune(run, "training.resume=auto")
    assert answer["code"] == 0
    assert "optimizer" not in answer["events"]
    assert (run / "checkpoints" / f"step_{STEPS}").is_dir()
    shutil.copytree(uninterrupted[0], expected)
    for folder in (run, expected):
        shutil.rmtree(folder / "checkpoints")
    same_run(run, expected)


def test_a_damaged_checkpoint_is_skipped(
    finetune: Run, uninterrupted: Whole, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted[0], run)
    folder = run / "checkpoints" / "step_9"
    about = json.loads((folder / "train_state.json").read_text())
    (folder / "train_state.json").write_text(json.dumps(about | {"compile": "maybe"}))
    (folder / "manifest.json").unlink()
    write_manifest(folder)
    answer = finetune(run, "training.resume=auto")
    assert answer["code"] == 0
    output = answer["output"]
    assert "warning: a damaged checkpoint is skipped: " in output
    assert "step_9/train_state.json: compile is 'maybe'; expected on or off" in output
    assert f"resumed after step 6 from {run / 'checkpoints' / 'step_6'}" in output
    shutil.rmtree(run / "checkpoints" / "step_9.damaged")
    same_run(run, uninterrupted[0])


def test_a_run_may_go_on_in_another_directory_with_its_data_moved(
    finetune: Run, uninterrupted: Whole, tmp_path: Path, rows: Path
) -> None:
    """The tokens have to be the same, the file need not."""
    source, run = uninterrupted[0] / "checkpoints" / "step_6", tmp_path / "run"
    moved = shutil.copy(rows, tmp_path / "moved.jsonl")
    options = (f"training.resume={source}", f"data.train={moved}", "training.save_every=null")
    assert finetune(run, *options)["code"] == 0
    assert curve(run) == curve(uninterrupted[0])
    assert not (run / "checkpoints").exists()


def test_another_config_is_refused_before_anything_is_touched(
    finetune: Run, uninterrupted: Whole, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted[0], run)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 20)
    changed = (f"data.train={rows}", "training.seed=5", "optimizer.lr=1e-3", "data.packing=none")
    answer = finetune(run, "training.resume=auto", *changed)
    assert answer["code"] == 2
    for key in ("data.packing", "data.train", "optimizer.lr", "training.seed"):
        assert f"error: {key}=" in answer["output"]
    answer = finetune(run, "training.resume=auto", "training.max_steps=30")
    assert answer["code"] == 2
    assert "a run of 30 steps has another learning rate at step 3" in answer["output"]
    same_run(run, uninterrupted[0])


# ---- full disk ----------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that holds one checkpoint of about 450 kB but not two."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting needs privileges")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("async_save", ["false", "true"])
def test_a_full_disk_leaves_the_last_good_checkpoint(
    finetune: Run, uninterrupted: Whole, small_disk: Path, async_save: str
) -> None:
    run = small_disk / "run"
    answer = finetune(run, f"training.async_save={async_save}")
    assert answer["code"] == 2
    error = answer["output"]
    assert "step_6: cannot be written: " in error
    assert "No space left on device" in error
    assert f"the last checkpoint is {run / 'checkpoints' / 'step_3'}; training.resume=auto" in error
    assert "Traceback" not in error
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_3"]
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert finetune(run, "training.resume=auto")["code"] == 0
    same_run(run, uninterrupted[0])
