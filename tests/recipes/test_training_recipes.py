"""finetune and dpo end to end on a tiny checkpoint, through the command line's own entry."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_runs import metrics, same_adapter, train

from qlora_builders import cli
from qlora_builders.checkpoint import load_with_adapter


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
    if method == "qlora":
        kept = {path.name for path in (run / "checkpoints").iterdir()}
        assert kept == {"step_9", "step_12"}
    if method == "full":
        model = load_with_adapter(run / "model", None)
        assert (run / "model" / "tokenizer.json").is_file()
    else:
        model = load_with_adapter(checkpoint, run / "adapter")
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]]))).all()


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        (["training.batch_size=1", "training.grad_accumulation=4"], 2e-4),
        (["training.activation_checkpointing=full"], 0),
        (["training.activation_checkpointing=none"], 0),
        (["training.seed=1"], None),
    ],
)
def test_how_a_step_is_computed_changes_no_loss(
    checkpoint: Path,
    rows: Path,
    finished: Path,
    tmp_path: Path,
    options: list[str],
    tolerance: float | None,
) -> None:
    assert finetune(checkpoint, rows, tmp_path / "run", *options) == 0
    losses, expected = metrics(tmp_path / "run", "loss"), metrics(finished, "loss")
    if tolerance is None:
        assert losses != expected
    else:
        assert losses == pytest.approx(expected, abs=tolerance, rel=0)


def test_packed_rows_train_like_unpacked_ones(checkpoint: Path, rows: Path, tmp_path: Path) -> None:
    """A step that holds the whole data set, so that both ways it has the same documents."""
    whole = ("training.batch_size=1000", "training.max_steps=4", "data.max_seq_len=100")
    for packing in ("none", "best_fit"):
        run = tmp_path / packing
        assert finetune(checkpoint, rows, run, *whole, f"data.packing={packing}") == 0
    for key in ("loss", "eval_loss", "grad_norm", "target_tokens"):
        packed, plain = (metrics(tmp_path / name, key) for name in ("best_fit", "none"))
        assert packed == pytest.approx(plain, rel=1e-5)


def test_steps_are_counted_in_packed_rows(checkpoint: Path, rows: Path, tmp_path: Path) -> None:
    """20 examples make 5 rows of 128 tokens, so 3 batches; three epochs of them are 5 steps."""
    overrides = ("data.packing=best_fit", "data.max_seq_len=128", "training.max_steps=null")
    counted = ("training.epochs=3", "training.batch_size=2", "training.grad_accumulation=2")
    assert finetune(checkpoint, rows, tmp_path / "run", *overrides, *counted) == 0
    assert metrics(tmp_path / "run", "step")[-1] == 5


def test_a_folder_is_taken_as_asked(
    finished: Path, checkpoint: Path, rows: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    given = [f"checkpoint.dir={checkpoint}", f"data.train={rows}", "data.eval=null"]
    error = refused("finetune", *given, f"output_dir={finished}")
    assert "is not empty; choose another, go on with its run by training.resume=auto" in error
    (tmp_path / "precious.txt").write_text("keep me")
    error = refused("finetune", *given, f"output_dir={tmp_path}", "overwrite=true")
    assert "holds no run; overwrite=true replaces only runs" in error
    assert (tmp_path / "precious.txt").read_text() == "keep me"
    options = ("training.max_steps=1", "data.eval=null", "overwrite=true")
    for _ in range(2):
        assert finetune(checkpoint, rows, tmp_path / "run", *options) == 0
    assert metrics(tmp_path / "run", "step") == [1]


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


# ---- preferences -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """7 rows, so that with 2 in a batch one of an epoch's 4 batches is short."""
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [
        {"prompt": f"what comes after {a}", "chosen": b, "rejected": f"not {b} at all"}
        for a, b in itertools.pairwise(words)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def dpo(checkpoint: Path, pairs: Path, run: Path, *overrides: str) -> int:
    options = ("training.max_steps=6", "training.batch_size=2", "training.grad_accumulation=2")
    return train("dpo", checkpoint, pairs, run, *options, "method.dropout=0.1", *overrides)


@pytest.fixture(scope="module")
def preferred(checkpoint: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("dpo") / "run"
    options = ("training.save_every=2", "training.keep_last=3", "training.samples=3")
    assert dpo(checkpoint, pairs, run, *options) == 0
    return run


def test_preferences_are_learned_and_the_run_is_complete(preferred: Path, checkpoint: Path) -> None:
    before, after = metrics(preferred, "eval_loss")
    assert before == pytest.approx(math.log(2), rel=1e-7)
    assert after < before - 0.1
    margins = metrics(preferred, "rewards/margins")
    assert margins[0] == 0
    assert margins[-1] > 0.1
    assert metrics(preferred, "eval_rewards/accuracies") == [0.0, 1.0]
    names = ("chosen", "rejected", "margins", "accuracies")
    for key in (*(f"rewards/{name}" for name in names), "logps/chosen", "logps/rejected"):
        assert len(metrics(preferred, key)) == 6
    files = {path.name for path in preferred.iterdir()}
    assert {"adapter", "checkpoints", "config.yaml", "report.html"} <= files
    rows = [json.loads(line) for line in (preferred / "samples.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == [0, 1, 2] * 2
    assert [row["reference"] for row in rows[:3]] == ["two", "three", "four"]
    model = load_with_adapter(checkpoint, preferred / "adapter")
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]]))).all()


def test_the_report_shows_rewards_and_takes_the_loss_for_one_of_pairs(preferred: Path) -> None:
    page = (preferred / "report.html").read_text()
    for text in ("Reward margin", "Reward accuracy", "nats per pair", "rewards/chosen"):
        assert text in page
    assert "nats per token" not in page
    settings = page[page.index("What differs from the defaults") :].split("</table>")[0]
    assert "training.batch_size" in settings
    assert "dpo." not in settings  # they have their defaults


def test_a_resumed_run_of_pairs_is_the_same_bit_for_bit(
    preferred: Path, checkpoint: Path, pairs: Path, tmp_path: Path, capsys: Any
) -> None:
    """Dropout, accumulation, and an epoch that ends inside a step."""
    run = tmp_path / "run"
    shutil.copytree(preferred, run)
    for step in (4, 6):
        shutil.rmtree(run / "checkpoints" / f"step_{step}")
    shutil.rmtree(run / "adapter")
    options = ("training.save_every=2", "training.keep_last=3", "training.samples=3")
    assert dpo(checkpoint, pairs, run, "training.resume=auto", "dpo.beta=0.2") == 2
    assert "dpo.beta=0.2, but the checkpoint was trained with 0.1" in capsys.readouterr().err
    assert dpo(checkpoint, pairs, run, *options, "training.resume=auto") == 0
    for key in ("loss", "grad_norm", "lr", "rewards/margins", "eval_loss", "eval_rewards/chosen"):
        assert metrics(run, key) == metrics(preferred, key)
    assert same_adapter(run, preferred)


def test_the_demo_learns_what_is_preferred_within_a_few_steps(tmp_path: Path) -> None:
    run = tmp_path / "run"
    short = ("training.max_steps=4", "data.max_rows=16", f"output_dir={run}")
    assert cli.main(["dpo", "experiment=demo_dpo", *short]) == 0
    assert metrics(run, "eval_loss")[-1] < 0.3
    assert metrics(run, "eval_rewards/margins")[-1] > 1
    assert metrics(run, "eval_rewards/accuracies") == [0.0, 1.0]  # of rows it did not train on


def test_a_dry_run_of_pairs_writes_nothing(
    checkpoint: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dpo(checkpoint, pairs, tmp_path / "run", "--dry-run") == 0
    output = capsys.readouterr().out
    assert "7 examples" in output
    assert output.endswith("6 steps to do; a dry run ends here, with nothing written\n")
    assert dpo(checkpoint, pairs, tmp_path / "run", "train=[norm]") == 2
    assert "dpo trains adapters only: its reference is the base" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
