"""One optimizer step, one evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from qlora_builders.console import Gather, alone
from qlora_builders.errors import TrainingError
from qlora_builders.modules import CausalLM, num_target_tokens
from qlora_builders.tensor.sharded import whole_tensor
from qlora_builders.training.objectives import Batch, NextToken, Objective


@dataclass(frozen=True)
class StepResult:
    loss: float  # mean over the step's target tokens, or what else the objective counts
    grad_norm: float  # before clipping
    target_tokens: int
    tokens: int  # padding included: what the hardware had to compute
    figures: Mapping[str, float] = field(default_factory=dict)  # means of what the objective logs


@dataclass(frozen=True)
class EvalResult:
    loss: float
    target_tokens: int
    figures: Mapping[str, float]


def train_step(
    model: CausalLM,
    batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    *,
    clip_grad_norm: float | None,
    gather: Gather = alone,
    objective: Objective | None = None,
) -> StepResult:
    """Accumulate gradients over `batches`, clip, update.

    Every target token of the step weighs the same, however it is cut into batches and over ranks.

    Args:
        batches: this rank's part of the step; as many as every other rank has.
        objective: by default `NextToken`.

    Raises:
        TrainingError: if the loss or the gradient is not finite; nothing is updated then.
    """
    objective = objective or NextToken()
    total = sum(gather(sum(map(objective.count, batches))))
    loss_sum, problem = 0.0, None
    sums: dict[str, float] = {}
    for batch in batches:
        batch_sum, figures = objective.sums(model, batch)
        loss = batch_sum / total
        loss_sum += loss.item()
        if not math.isfinite(loss_sum):
            problem = problem or f"the loss is {loss.item()} on rows {batch.rows}"
        loss.backward()  # all ranks have to, even then
        _add(sums, figures)
    tokens = sum(batch.input_ids.numel() for batch in batches)
    targets = sum(num_target_tokens(batch.labels) for batch in batches)
    parts = gather((problem, loss_sum, tokens, targets, sums))
    problems, losses, counts, target_counts, all_sums = zip(*parts, strict=True)
    if any(problems):
        raise TrainingError(next(filter(None, problems)))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, clip_grad_norm or math.inf)
    grad_norm = whole_tensor(norm).item()
    if not math.isfinite(grad_norm):
        rows = [row for part in gather([b.rows for b in batches]) for rows in part for row in rows]
        raise TrainingError(f"the gradient norm is {grad_norm} on rows {rows}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    figures = _means(all_sums, total)
    return StepResult(sum(losses), grad_norm, sum(target_counts), sum(counts), figures)


def _means(sums: Iterable[Mapping[str, float]], count: int) -> dict[str, float]:
    """Of what each rank has added up."""
    totals: dict[str, float] = {}
    for part in sums:
        _add(totals, part)
    return {key: value / count for key, value in totals.items()}


def _add(totals: dict[str, float], part: Mapping[str, float]) -> None:
    for key, value in part.items():
        totals[key] = totals.get(key, 0.0) + value


@torch.no_grad()
def evaluate_objective(
    model: CausalLM, batches: Iterable[Batch], objective: Objective, *, gather: Gather = alone
) -> EvalResult:
    """The mean over all batches; dropout off, the mode restored after."""
    training = model.training
    model.eval()
    loss_sum, count, targets = 0.0, 0, 0
    sums: dict[str, float] = {}
    for batch in batches:
        loss, figures = objective.sums(model, batch)
        loss_sum += loss.item()
        count += objective.count(batch)
        targets += num_target_tokens(batch.labels)
        _add(sums, figures)
    model.train(training)
    parts = gather((loss_sum, count, targets, sums))
    losses, counts, target_counts, all_sums = zip(*parts, strict=True)
    total = sum(counts)
    if total == 0:
        raise TrainingError("no token to evaluate on: the data has no target tokens")
    return EvalResult(sum(losses) / total, sum(target_counts), _means(all_sums, total))
