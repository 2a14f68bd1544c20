"""Plans compared by their loss on held-out data, and whether a difference is more than chance."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qlora_builders.models.precision import Choice
from qlora_builders.modules import CausalLM
from qlora_builders.training.loop import Batch, evaluate_loss

STANDARD_ERRORS = 2.0  # a smaller difference is a tie: 1 in 40 such wins would be luck

Losses = Sequence[tuple[float, int]]  # of every batch: sum over its target tokens, their number


@dataclass(frozen=True)
class Measured:
    """A plan and its losses on held-out data, in the same batches for every plan."""

    name: str
    choice: Choice
    losses: Losses

    @property
    def loss(self) -> float:
        """Nats per target token."""
        return sum(loss for loss, _ in self.losses) / sum(tokens for _, tokens in self.losses)


def batch_losses(model: CausalLM, batches: Iterable[Batch]) -> Losses:
    means = [evaluate_loss(model, [batch]) for batch in batches]
    return [(mean * tokens, tokens) for mean, tokens in means]


def paired_difference(ours: Losses, theirs: Losses) -> tuple[float, float]:
    """(ours - theirs per target token, its standard error over the batches).

    The error is that of a ratio of two sums; infinite for a single batch.
    """
    total = sum(tokens for _, tokens in ours)
    differences = [(a - b, tokens) for (a, tokens), (b, _) in zip(ours, theirs, strict=True)]
    mean = sum(difference for difference, _ in differences) / total
    count = len(differences)
    if count < 2:
        return mean, math.inf
    squares = sum((difference - mean * tokens) ** 2 for difference, tokens in differences)
    return mean, math.sqrt(squares * count / (count - 1)) / total


def decide(plan: Measured, uniform: Sequence[Measured]) -> tuple[Measured, str]:
    """The plan to use, and why: `plan` only if it beats the best other by more than chance."""
    if not uniform:
        return plan, "no uniform setting fits the budget, so the plan is written"
    best = min(uniform, key=lambda one: one.loss)
    difference, error = paired_difference(plan.losses, best.losses)
    figures = f"its loss is {difference:+.5f} (standard error {error:.5f}) beside {best.name!r}"
    if difference < -STANDARD_ERRORS * error:
        return plan, f"the plan beats every uniform setting: {figures}"
    if difference > STANDARD_ERRORS * error:
        return best, f"uniform is better, and is written instead of the plan: {figures}"
    return best, f"uniform is as good, and is written instead of the plan: {figures}"
