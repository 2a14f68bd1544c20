"""The recipe on several ranks: the same losses and adapters as in one process, and resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file

from qlora_builders.cli import load_recipe, recipe_path
from qlora_builders.config.compose import compose

# Sums over ranks are added up in another order than sums over rows, and Adam divides by what may
# be small: float32 has 6e-8 per operation, and 20 steps later that has become
LOSS_BOUND = 2e-6  # relative
ADAPTER_BOUND = 2e-4  # of the largest weight


def finetune(overrides: list[str], output_dir: Path) -> None:
    load_recipe(recipe_path("finetune"))(
        compose("finetune", [*overrides, f"output_dir={output_dir}"])
    )


def rows(run: Path, key: str = "loss") -> dict[int, float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row[key] for row in lines if key in row}


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_same_run(run: Path, alone: Path) -> None:
    for key in ("loss", "eval_loss", "grad_norm"):
        ours, theirs = rows(run, key), rows(alone, key)
        assert ours.keys() == theirs.keys()
        assert ours == pytest.approx(theirs, rel=LOSS_BOUND if "loss" in key else 1e-4)
    for key in ("target_tokens", "eval_tokens"):
        assert rows(run, key) == rows(alone, key)
    ours, theirs = adapter(run / "adapter"), adapter(alone / "adapter")
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        difference = (ours[name] - weight).abs().max()
        assert difference <= ADAPTER_BOUND * weight.abs().max(), name


@pytest.fixture(scope="module")
def alone(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    finetune(overrides, run)
    assert len(rows(run)) == 20
    return run


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_run_does_not_depend_on_the_number_of_ranks(
    world_size: int, overrides: list[str], alone: Path, tmp_path: Path
) -> None:
    run_ranks(world_size, finetune, overrides, tmp_path / "run", join=False)
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.parametrize(
    ("before", "after"), [(2, 4), pytest.param(4, 2, marks=pytest.mark.slow), (2, 1), (1, 2)]
)
def test_a_run_goes_on_with_another_number_of_ranks(
    before: int, after: int, overrides: list[str], alone: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    if before == 1:
        shutil.copytree(alone, run)
    else:
        run_ranks(before, finetune, overrides, run, join=False)
    shutil.rmtree(run / "checkpoints/step_20")
    resumed = [*overrides, "training.resume=auto"]
    if after == 1:
        finetune(resumed, run)
    else:
        run_ranks(after, finetune, resumed, run, join=False)
    assert_same_run(run, alone)
