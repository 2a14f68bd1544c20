"""The dpo recipe end to end, through the command line's own entry."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_runs import metrics, same_adapter, train

from qlora_builders import cli
from qlora_builders.checkpoint import load_with_adapter


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
def finished(checkpoint: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("dpo") / "run"
    options = ("training.save_every=2", "training.keep_last=3", "training.samples=3")
    assert dpo(checkpoint, pairs, run, *options) == 0
    return run


def test_a_run_learns_and_is_complete(finished: Path, checkpoint: Path) -> None:
    before, after = metrics(finished, "eval_loss")
    assert before == pytest.approx(math.log(2), rel=1e-7)
    assert after < before - 0.1
    margins = metrics(finished, "rewards/margins")
    assert margins[0] == 0
    assert margins[-1] > 0.1
    assert metrics(finished, "eval_rewards/accuracies") == [0.0, 1.0]
    names = ("chosen", "rejected", "margins", "accuracies")
    for key in (*(f"rewards/{name}" for name in names), "logps/chosen", "logps/rejected"):
        assert len(metrics(finished, key)) == 6
    files = {path.name for path in finished.iterdir()}
    assert {"adapter", "checkpoints", "config.yaml", "report.html"} <= files
    rows = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == [0, 1, 2] * 2
    assert [row["reference"] for row in rows[:3]] == ["two", "three", "four"]
    model = load_with_adapter(checkpoint, finished / "adapter")
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]]))).all()


def test_the_report_shows_rewards_and_takes_the_loss_for_one_of_pairs(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    for text in ("Reward margin", "Reward accuracy", "nats per pair", "rewards/chosen"):
        assert text in page
    assert "nats per token" not in page
    settings = page[page.index("What differs from the defaults") :].split("</table>")[0]
    assert "training.batch_size" in settings
    assert "dpo." not in settings  # they have their defaults


def test_a_resumed_run_is_the_same_bit_for_bit(
    finished: Path, checkpoint: Path, pairs: Path, tmp_path: Path, capsys: Any
) -> None:
    """Dropout, accumulation, and an epoch that ends inside a step."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for step in (4, 6):
        shutil.rmtree(run / "checkpoints" / f"step_{step}")
    shutil.rmtree(run / "adapter")
    options = ("training.save_every=2", "training.keep_last=3", "training.samples=3")
    assert dpo(checkpoint, pairs, run, "training.resume=auto", "dpo.beta=0.2") == 2
    assert "dpo.beta=0.2, but the checkpoint was trained with 0.1" in capsys.readouterr().err
    assert dpo(checkpoint, pairs, run, *options, "training.resume=auto") == 0
    for key in ("loss", "grad_norm", "lr", "rewards/margins", "eval_loss", "eval_rewards/chosen"):
        assert metrics(run, key) == metrics(finished, key)
    assert same_adapter(run, finished)


def test_the_demo_learns_what_is_preferred_within_a_few_steps(tmp_path: Path) -> None:
    run = tmp_path / "run"
    short = ("training.max_steps=4", "data.max_rows=16", f"output_dir={run}")
    assert cli.main(["dpo", "experiment=demo_dpo", *short]) == 0
    assert metrics(run, "eval_loss")[-1] < 0.3
    assert metrics(run, "eval_rewards/margins")[-1] > 1
    assert metrics(run, "eval_rewards/accuracies") == [0.0, 1.0]  # of rows it did not train on


def test_a_dry_run_writes_nothing(
    checkpoint: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dpo(checkpoint, pairs, tmp_path / "run", "--dry-run") == 0
    output = capsys.readouterr().out
    assert "7 examples" in output
    assert output.endswith("6 steps to do; a dry run ends here, with nothing written\n")
    assert dpo(checkpoint, pairs, tmp_path / "run", "train=[norm]") == 2
    assert "dpo trains adapters only: its reference is the base" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
