"""The finetune recipe end to end on a tiny checkpoint, through the command line's own entry."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recipe_runs import metrics, same_adapter, train

from qlora_builders.checkpoint import load_with_adapter
from qlora_builders.config.shipped import shipped_dir


def finetune(checkpoint: Path, rows: Path, run: Path, *overrides: str) -> int:
    options = ("training.max_steps=12", "training.batch_size=4")
    return train("finetune", checkpoint, rows, run, *options, *overrides)


@pytest.fixture(scope="module")
def finished(checkpoint: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finetune") / "run"
    assert finetune(checkpoint, rows, run, "training.save_every=3", "training.keep_last=2") == 0
    return run


def test_a_dry_run_checks_and_writes_nothing(
    checkpoint: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(checkpoint, rows, tmp_path / "run", "--dry-run", "optimizer.lr=0.5") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["train", "eval"]
    assert any(line.startswith("warning: optimizer.lr is 0.5; for adapters") for line in lines)
    assert lines[-1] == "12 steps to do; a dry run ends here, with nothing written"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_every_method_learns_and_leaves_a_complete_run(
    checkpoint: Path, rows: Path, finished: Path, tmp_path: Path, method: str
) -> None:
    run = finished
    if method != "qlora":
        run = tmp_path / "run"
        assert finetune(checkpoint, rows, run, f"method={method}") == 0
    losses = metrics(run, "eval_loss")
    assert len(losses) == 2  # before and after
    assert losses[1] < losses[0] - 0.2
    assert len(metrics(run, "loss")) == 12
    for key in ("lr", "grad_norm", "tokens_per_s", "peak_memory_mib", "target_tokens"):
        assert all(value > 0 for value in metrics(run, key))
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "report.html"} <= names
    if method == "full":
        model = load_with_adapter(run / "model", None)
        assert (run / "model" / "tokenizer.json").is_file()
    else:
        model = load_with_adapter(checkpoint, run / "adapter")
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]]))).all()


def test_the_same_seed_gives_the_same_losses_and_weights(
    checkpoint: Path, rows: Path, tmp_path: Path
) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        overrides = ("method.dropout=0.1", f"training.seed={seed}", "training.max_steps=6")
        assert finetune(checkpoint, rows, tmp_path / name, *overrides) == 0
    a, b, c = (metrics(tmp_path / name, "loss") for name in "abc")
    assert a == b != c
    assert same_adapter(tmp_path / "a", tmp_path / "b")


def test_accumulation_equals_a_larger_batch(
    checkpoint: Path, rows: Path, finished: Path, tmp_path: Path
) -> None:
    small = ("training.batch_size=1", "training.grad_accumulation=4")
    assert finetune(checkpoint, rows, tmp_path / "small", *small) == 0
    losses = metrics(tmp_path / "small", "loss")
    assert losses == pytest.approx(metrics(finished, "loss"), abs=2e-4)


def test_packed_rows_train_like_unpacked_ones(checkpoint: Path, rows: Path, tmp_path: Path) -> None:
    """A step that holds the whole data set, so that both ways it has the same documents."""
    whole = ("training.batch_size=1000", "training.max_steps=4", "data.max_seq_len=100")
    for packing in ("none", "best_fit"):
        run = tmp_path / packing
        assert finetune(checkpoint, rows, run, *whole, f"data.packing={packing}") == 0
    for key in ("loss", "eval_loss", "grad_norm"):
        packed, plain = (metrics(tmp_path / name, key) for name in ("best_fit", "none"))
        assert packed == pytest.approx(plain, rel=1e-5)
    assert metrics(tmp_path / "none", "target_tokens") == metrics(
        tmp_path / "best_fit", "target_tokens"
    )


def test_steps_are_counted_in_packed_rows(checkpoint: Path, rows: Path, tmp_path: Path) -> None:
    """20 examples make 5 rows of 128 tokens, so 3 batches; three epochs of them are 5 steps."""
    overrides = ("data.packing=best_fit", "data.max_seq_len=128", "training.max_steps=null")
    counted = ("training.epochs=3", "training.batch_size=2", "training.grad_accumulation=2")
    assert finetune(checkpoint, rows, tmp_path / "run", *overrides, *counted) == 0
    assert metrics(tmp_path / "run", "step")[-1] == 5


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_activation_checkpointing_changes_no_loss(
    checkpoint: Path, rows: Path, finished: Path, tmp_path: Path, mode: str
) -> None:
    option = f"training.activation_checkpointing={mode}"
    assert finetune(checkpoint, rows, tmp_path / "run", option) == 0
    assert metrics(tmp_path / "run", "loss") == metrics(finished, "loss")


def test_checkpoints_are_kept_as_asked(checkpoint: Path, finished: Path) -> None:
    assert {path.name for path in (finished / "checkpoints").iterdir()} == {"step_9", "step_12"}
    load_with_adapter(checkpoint, finished / "checkpoints" / "step_9")


def test_a_run_is_not_overwritten_unasked(
    checkpoint: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert finetune(checkpoint, rows, run, "training.max_steps=1") == 0
    assert finetune(checkpoint, rows, run, "training.max_steps=1") == 2
    error = capsys.readouterr().err
    assert "is not empty; choose another, or set overwrite=true" in error
    assert "training.resume" not in error  # there is no checkpoint
    assert finetune(checkpoint, rows, run, "training.max_steps=1", "overwrite=true") == 0


def test_overwrite_spares_a_folder_that_is_no_run(
    checkpoint: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "precious.txt").write_text("keep me")
    assert finetune(checkpoint, rows, tmp_path, "overwrite=true") == 2
    assert "holds no run; overwrite=true replaces only runs" in capsys.readouterr().err
    assert (tmp_path / "precious.txt").read_text() == "keep me"


def test_a_diverging_run_stops_and_names_step_and_rows(
    checkpoint: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    overrides = ("optimizer.lr=1e30", "training.save_every=1", "lr_schedule.warmup_steps=0")
    assert finetune(checkpoint, rows, run, *overrides) == 2
    error = capsys.readouterr().err
    assert "step 2: the loss is" in error
    assert "on rows [" in error
    assert f"the last checkpoint is {run / 'checkpoints' / 'step_1'}" in error
    assert not (run / "adapter").exists()
    load_with_adapter(checkpoint, run / "checkpoints" / "step_1")


def test_an_adapter_that_learned_nothing_is_an_error(
    checkpoint: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(checkpoint, rows, tmp_path / "run", "optimizer.lr=1e-60") == 2
    assert "all lora_B weights are what they were before training" in capsys.readouterr().err
    assert not (tmp_path / "run" / "adapter").exists()


def test_ctrl_c_leaves_a_loadable_checkpoint(checkpoint: Path, rows: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        [
            sys.executable,
            str(shipped_dir("recipes") / "finetune.py"),
            f"checkpoint.dir={checkpoint}",
            f"data.train={rows}",
            "data.eval=null",
            f"output_dir={run}",
            "training.max_steps=100000",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 1/"):
            break
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    (folder,) = (run / "checkpoints").iterdir()
    assert f"the last checkpoint is {folder}" in output.replace("\n", "")
    load_with_adapter(checkpoint, folder)
