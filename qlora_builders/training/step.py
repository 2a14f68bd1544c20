"""One optimizer step, one evaluation, and the checks around them."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from qlora_builders.errors import PlanError, TrainingError
from qlora_builders.modules import CausalLM, LoRALinear, num_target_tokens
from qlora_builders.tensor.sharded import local_part, whole_tensor
from qlora_builders.training.objective import Batch, NextToken, Objective

# value -> everybody's values, by rank: how the processes of a run agree
Gather = Callable[[Any], list[Any]]


def alone(value: Any) -> list[Any]:
    return [value]


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


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """
    Raises:
        PlanError: if nothing trains.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise PlanError(
            "the plan trains nothing; add a rule of kind 'lora' or 'qlora', a rule "
            "{match: ..., kind: linear, trainable: true}, or name modules in `train`"
        )
    return parameters


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


def evaluate_loss(
    model: CausalLM, batches: Iterable[Batch], *, gather: Gather = alone
) -> tuple[float, int]:
    """(mean loss over all target tokens, their number), as `evaluate_objective` finds them."""
    result = evaluate_objective(model, batches, NextToken(), gather=gather)
    return result.loss, result.target_tokens


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


def check_adapters_learned(model: nn.Module, *, gather: Gather = alone) -> None:
    """
    Raises:
        TrainingError: if every lora_B is still zero, or what PiSSA started it from, so that the run
            changed nothing.
    """
    adapters = [module for module in model.modules() if isinstance(module, LoRALinear)]
    learned = any(_learned(module) for module in adapters)
    if adapters and not any(gather(learned)):
        raise TrainingError(
            "all lora_B weights are what they were before training, so the adapter does nothing; "
            "check optimizer.lr and lr_schedule"
        )


def _learned(module: LoRALinear) -> bool:
    weight, start = local_part(module.lora_B.weight), module.lora_B_init
    return bool(weight.any() if start is None else (weight != start).any())


def all_finite(parameters: Iterable[Tensor], *, gather: Gather = alone) -> bool:
    return all(gather(all(bool(torch.isfinite(local_part(p)).all()) for p in parameters)))


class StopRequest:
    """Set by the first SIGINT or SIGTERM: finish the step, save, leave."""

    def __init__(self, gather: Gather = alone) -> None:
        self.signal_number: int | None = None
        self._gather = gather

    def __bool__(self) -> bool:
        return self.signal_number is not None

    def agreed(self) -> bool:
        """Whether it is set on any rank, and then on all; all ranks must call it."""
        number = next((n for n in self._gather(self.signal_number) if n is not None), None)
        if number is not None:
            self.signal_number = number
        return number is not None

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, as shells expect; 0 after SIGTERM, a stop that a scheduler planned."""
        return 128 + signal.SIGINT if self.signal_number == signal.SIGINT else 0


@contextmanager
def stop_on_signal(gather: Gather = alone) -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request; the second one acts at once.

    At once is an exception, so that files and the terminal are left in order; a third signal that
    comes before that is done ends the process as if nobody had asked for it.
    """
    request = StopRequest(gather)
    numbers = (signal.SIGINT, signal.SIGTERM)

    def note(number: int, _frame: FrameType | None) -> None:
        request.signal_number = number
        if os.environ.get("RANK", "0") == "0":  # a print could meet another in the middle
            os.write(2, b"\nfinishing this step, then saving; the same again leaves at once\n")
        for other in numbers:
            signal.signal(other, leave)

    def leave(number: int, _frame: FrameType | None) -> None:
        for other in numbers:
            signal.signal(other, signal.SIG_DFL)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    previous = {number: signal.signal(number, note) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def until_stopped(batches: Iterable[Batch], stop: StopRequest) -> Iterator[Batch]:
    """The batches until `stop` is set, and at least one."""
    for batch in batches:
        yield batch
        if stop.agreed():
            return
