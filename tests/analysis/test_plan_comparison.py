"""Losses and KL on held-out data, and when a difference counts."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from archs import tiny_arch
from torch import Tensor

from qlora_builders import llama
from qlora_builders.analysis.precision import (
    Figures,
    HeldOut,
    Measured,
    decide,
    paired_difference,
)
from qlora_builders.data import Batch
from qlora_builders.errors import TrainingError
from qlora_builders.modules import CausalLM
from qlora_builders.training.objectives import NextToken
from qlora_builders.training.step import evaluate_objective

ARCH = tiny_arch(
    vocab_size=31, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, num_kv_heads=1
)


def build(noise: float = 0.0) -> CausalLM:
    torch.manual_seed(0)
    model = llama(ARCH, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data += noise * torch.randn_like(parameter)
    return model


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(5)
    found = []
    for length in (60, 33, 7):
        ids = torch.randint(31, (16, length), generator=generator)
        labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)
        found.append(Batch(ids, labels, list(range(16))))
    return found


@torch.no_grad()
def log_probs(model: CausalLM, batch: Batch) -> Tensor:
    return model(batch.input_ids)[:, :-1][batch.labels[:, 1:] != -100].log_softmax(-1)


def test_figures_are_the_loss_and_the_divergence() -> None:
    model, changed = build(), build(noise=0.02)
    figures = HeldOut(model, batches(), seed=0).figures(changed)
    for batch, one in zip(batches(), figures, strict=True):
        alone = evaluate_objective(changed, [batch], NextToken())
        assert one.tokens == alone.target_tokens
        assert one.loss == pytest.approx(alone.loss * one.tokens, rel=1e-5)
    exact = sum(
        F.kl_div(log_probs(changed, b), log_probs(model, b), log_target=True, reduction="sum")
        for b in batches()
    )
    measured = Measured("", {}, figures)
    tokens = sum(one.tokens for one in figures)
    assert measured.kl == pytest.approx(float(exact) / tokens, rel=0.15)
    expected = evaluate_objective(changed, batches(), NextToken()).loss
    assert measured.loss == pytest.approx(expected, rel=1e-5)


def test_the_unquantized_model_is_at_distance_zero() -> None:
    model = build()
    assert [one.kl for one in HeldOut(model, batches(), seed=0).figures(model)] == [0, 0, 0]


def test_a_batch_without_targets_counts_nothing() -> None:
    ids = torch.tensor([[1, 2, 3]])
    empty = Batch(ids, torch.full_like(ids, -100), [0])
    held_out = HeldOut(build(), [empty, *batches()], seed=0)
    assert held_out.figures(build(0.1))[0] == Figures(0.0, 0.0, 0)
    with pytest.raises(TrainingError, match="the held-out data has no target tokens"):
        HeldOut(build(), [empty], seed=0)


def measured(name: str, *losses: float, kl: float = 0.1, tokens: int = 10) -> Measured:
    return Measured(name, {}, [Figures(loss * tokens, kl * tokens, tokens) for loss in losses])


def test_paired_difference_is_the_standard_error_of_the_mean() -> None:
    """Batches of one size: the textbook's."""
    ours, theirs = measured("a", 1.0, 2.0, 4.0, 3.0), measured("b", 1.5, 2.1, 3.8, 3.3)
    differences = [-0.5, -0.1, 0.2, -0.3]
    mean, error = paired_difference(ours, theirs, "loss")
    assert mean == pytest.approx(statistics.mean(differences))
    assert error == pytest.approx(statistics.stdev(differences) / 2)


def test_large_batches_weigh_more_and_one_batch_says_nothing() -> None:
    ours = Measured("a", {}, [Figures(30.0, 0, 30), Figures(20.0, 0, 10)])
    theirs = Measured("b", {}, [Figures(0.0, 0, 30), Figures(0.0, 0, 10)])
    assert paired_difference(ours, theirs, "loss")[0] == pytest.approx(50 / 40)
    assert paired_difference(measured("a", 1.0), measured("b", 2.0), "loss") == (-1.0, math.inf)


BASE = measured("not quantized", 1.0, 2.0, 3.0, kl=0.0)
UNIFORM = [measured("64", 1.2, 2.2, 3.2), measured("32", 1.1, 2.1, 3.1, kl=0.05)]


@pytest.mark.parametrize(
    ("losses", "kl", "chosen", "verdict"),
    [
        ((1.0, 2.05, 3.0), 0.01, "plan", "better than uniform, and written"),
        ((1.2, 2.21, 3.2), 0.01, "32", "worse than uniform, which is written"),
        ((1.0, 2.2, 3.1), 0.01, "plan", "as good as uniform, closer to the unquantized model"),
        ((1.0, 2.2, 3.1), 0.05, "32", "uniform is as good, and is written"),
    ],
)
def test_decide(losses: tuple[float, ...], kl: float, chosen: str, verdict: str) -> None:
    best, why = decide(measured("plan", *losses, kl=kl), UNIFORM, BASE)
    assert best.name == chosen
    assert why.startswith(verdict)
    assert "beside '32'" in why
    assert "luck" not in why


def test_a_uniform_setting_better_than_the_base_is_luck() -> None:
    lucky = measured("lucky", 0.5, 1.51, 2.5)
    best, why = decide(measured("plan", 1.0, 2.0, 3.0), [*UNIFORM, lucky], BASE)
    assert best is lucky
    assert "even better than the unquantized model, which is luck" in why


def test_without_a_uniform_setting_there_is_only_the_plan() -> None:
    plan = measured("plan", 1.0)
    assert decide(plan, [], BASE) == (
        plan,
        "no uniform setting fits the budget: the plan is written",
    )
