"""One optimizer step, one evaluation, and the checks around them."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

import torch
from torch import Tensor, nn

from qlora_builders.errors import PlanError, TrainingError
from qlora_builders.modules import CausalLM, LoRALinear, num_target_tokens


class Batch(Protocol):
    """What a step needs of a batch."""

    @property
    def input_ids(self) -> Tensor: ...  # [batch, seq]
    @property
    def labels(self) -> Tensor: ...  # [batch, seq], IGNORE_INDEX where not trained
    @property
    def rows(self) -> list[int]: ...  # where in the data the sequences come from
    @property
    def document_ids(self) -> Tensor | None: ...  # [batch, seq] where a row holds several


@dataclass(frozen=True)
class StepResult:
    loss: float  # mean over the step's target tokens
    grad_norm: float  # before clipping
    target_tokens: int
    tokens: int  # padding included: what the hardware had to compute


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
) -> StepResult:
    """Accumulate gradients over `batches`, clip, update.

    Every target token of the step weighs the same, however it is cut into batches.

    Raises:
        TrainingError: if the loss or the gradient is not finite; nothing is updated then.
    """
    total = sum(num_target_tokens(batch.labels) for batch in batches)
    loss_sum = 0.0
    for batch in batches:
        loss = model.loss(batch.input_ids, batch.labels, document_ids=batch.document_ids) / total
        loss_sum += loss.item()
        if not math.isfinite(loss_sum):
            raise TrainingError(f"the loss is {loss.item()} on rows {batch.rows}")
        loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = nn.utils.clip_grad_norm_(parameters, clip_grad_norm or math.inf).item()
    if not math.isfinite(grad_norm):
        rows = [row for batch in batches for row in batch.rows]
        raise TrainingError(f"the gradient norm is {grad_norm} on rows {rows}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    tokens = sum(batch.input_ids.numel() for batch in batches)
    return StepResult(loss_sum, grad_norm, total, tokens)


@torch.no_grad()
def evaluate_loss(model: CausalLM, batches: Iterable[Batch]) -> tuple[float, int]:
    """(mean loss over all target tokens, their number); dropout off, the mode restored after."""
    training = model.training
    model.eval()
    loss_sum, total = 0.0, 0
    for batch in batches:
        loss = model.loss(batch.input_ids, batch.labels, document_ids=batch.document_ids)
        loss_sum += loss.item()
        total += num_target_tokens(batch.labels)
    model.train(training)
    if total == 0:
        raise TrainingError("no token to evaluate on: the data has no target tokens")
    return loss_sum / total, total


def check_adapters_learned(model: nn.Module) -> None:
    """
    Raises:
        TrainingError: if every lora_B is still zero, or what PiSSA started it from, so that the run
            changed nothing.
    """
    adapters = [module for module in model.modules() if isinstance(module, LoRALinear)]
    if adapters and not any(_learned(module) for module in adapters):
        raise TrainingError(
            "all lora_B weights are what they were before training, so the adapter does nothing; "
            "check optimizer.lr and lr_schedule"
        )


def _learned(module: LoRALinear) -> bool:
    weight, start = module.lora_B.weight, module.lora_B_init
    return bool(weight.any() if start is None else (weight != start).any())


def all_finite(parameters: Iterable[Tensor]) -> bool:
    return all(bool(torch.isfinite(parameter).all()) for parameter in parameters)


class StopRequest:
    """Set by the first SIGINT or SIGTERM: finish the step, save, leave."""

    signal_number: int | None = None

    def __bool__(self) -> bool:
        return self.signal_number is not None

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, as shells expect; 0 after SIGTERM, a stop that a scheduler planned."""
        return 128 + signal.SIGINT if self.signal_number == signal.SIGINT else 0


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request; the second one acts at once.

    At once is an exception, so that files and the terminal are left in order; a third signal that
    comes before that is done ends the process as if nobody had asked for it.
    """
    request = StopRequest()
    numbers = (signal.SIGINT, signal.SIGTERM)

    def note(number: int, _frame: FrameType | None) -> None:
        request.signal_number = number
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
        if stop:
            return
