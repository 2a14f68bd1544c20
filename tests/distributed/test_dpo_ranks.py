"""Preference training over ranks: the same losses, rewards and adapters as in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import run_ranks
from test_finetune_ranks import LOSS_BOUND, NORM_BOUND, WEIGHT_BOUND, rows, weights

from qlora_builders.cli import load_recipe, recipe_path
from qlora_builders.config.compose import compose

# Log-probabilities are sums of a hundred, so a reward has a larger absolute error than a loss.
REWARD_BOUND = 1e-5


def dpo(overrides: list[str], output_dir: Path) -> None:
    cfg = compose("dpo", ["experiment=demo_dpo", *overrides, f"output_dir={output_dir}"])
    load_recipe(recipe_path("dpo"))(cfg)


def test_a_run_does_not_depend_on_the_number_of_ranks(overrides: list[str], tmp_path: Path) -> None:
    """Of 25 rows, 3 a batch, one is left for the last batch: the other rank has a stand-in."""
    options = [*overrides, "training.max_steps=10", "data.max_seq_len=100"]
    options += ["training.eval_every=null", "training.activation_checkpointing=full"]
    dpo(options, tmp_path / "alone")
    run_ranks(2, dpo, options, tmp_path / "run", join=False)
    for key in ("loss", "grad_norm", "target_tokens", "rewards/margins", "rewards/accuracies"):
        ours, theirs = rows(tmp_path / "run", key), rows(tmp_path / "alone", key)
        bound = {"loss": LOSS_BOUND, "rewards/margins": REWARD_BOUND}.get(key, NORM_BOUND)
        assert len(theirs) == 10
        assert ours == pytest.approx(theirs, rel=bound, abs=REWARD_BOUND)
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "alone")
    for name, weight in theirs.items():
        difference = (ours[name] - weight).abs().max()
        assert difference <= WEIGHT_BOUND * weight.abs().max(), name
