"""What a step minimizes: a mean over something countable, so that any split of it adds up.

Direct Preference Optimization (https://arxiv.org/abs/2305.18290) has the base as reference. The
implicit reward of an answer y to a prompt x is

    r(x, y) = beta * (log p(y | x) - log p_ref(y | x))

and the loss makes the chosen answer's larger than the rejected one's. p is the base with its
adapters, p_ref the same base without them: there is no second model, and nothing to load for it.

Shapes: p = pairs. A batch of pairs has 2 p sequences: chosen, rejected, chosen, rejected ...
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_builders.errors import PlanError
from qlora_builders.modules import (
    IGNORE_INDEX,
    CausalLM,
    LoRALinear,
    adapters_disabled,
    num_target_tokens,
)


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


class Objective(Protocol):
    """The loss of a step is `sums(...)[0]`, added up, over `count(...)`, added up."""

    def count(self, batch: Batch) -> int:
        """What the batch has of that which the mean is taken of: tokens, pairs."""

    def sums(self, model: CausalLM, batch: Batch) -> tuple[Tensor, Mapping[str, float]]:
        """The sum of losses, to call backward on, and sums of figures to log."""


class NextToken:
    """Mean cross-entropy of the target tokens."""

    def count(self, batch: Batch) -> int:
        return num_target_tokens(batch.labels)

    def sums(self, model: CausalLM, batch: Batch) -> tuple[Tensor, Mapping[str, float]]:
        return model.loss(batch.input_ids, batch.labels, document_ids=batch.document_ids), {}


def mean_and_error(sums: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """(sum of `sums` / sum of `weights`, its standard error), each over independent parts.

    A part is what was drawn as one: a row with the sum of its tokens' losses and their number, or
    an answer with 0 or 1 and weight 1. The error is that of a ratio of two sums, which for equal
    weights is the usual one of a mean; infinite for a single part.
    """
    total, count = sum(weights), len(weights)
    mean = sum(sums) / total
    if count < 2:
        return mean, math.inf
    squares = sum((part - mean * weight) ** 2 for part, weight in zip(sums, weights, strict=True))
    return mean, math.sqrt(squares * count / (count - 1)) / total


def _sigmoid(margins: Tensor, smoothing: float) -> Tensor:
    """Smoothing takes a share of the pairs to be labelled the wrong way round
    (https://ericmitchell.ai/cdpo.pdf)."""
    return -(1 - smoothing) * F.logsigmoid(margins) - smoothing * F.logsigmoid(-margins)


def _hinge(margins: Tensor, smoothing: float) -> Tensor:
    """https://arxiv.org/abs/2305.10425"""
    return torch.relu(1 - margins)


LOSSES: dict[str, Callable[[Tensor, float], Tensor]] = {"sigmoid": _sigmoid, "hinge": _hinge}


@dataclass(frozen=True)
class DPO:
    """The loss as an objective, and the rewards to log, under TRL's names.

    Args:
        beta: how much an answer's log-probability may move away from the reference's: the larger,
            the less.
        loss_type: a key of `LOSSES`.
        label_smoothing: share of pairs taken to be labelled the wrong way round, below 0.5.
    """

    beta: float = 0.1
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0

    def count(self, batch: Batch) -> int:
        """Pairs; one without targets stands in on a rank that has none."""
        return int(_are_pairs(batch.labels).sum())

    def sums(self, model: CausalLM, batch: Batch) -> tuple[Tensor, Mapping[str, float]]:
        with torch.no_grad(), adapters_disabled(model):
            reference = model.log_probs(batch.input_ids, batch.labels)  # [2 p]
        policy = model.log_probs(batch.input_ids, batch.labels)  # [2 p]
        return self.sums_of(policy, reference, _are_pairs(batch.labels))

    def sums_of(
        self, policy: Tensor, reference: Tensor, weights: Tensor
    ) -> tuple[Tensor, Mapping[str, float]]:
        """The sum of losses, and sums of rewards.

        Args:
            policy, reference: log-probabilities of the answers, float32 [2 p].
            weights: [p]; zero where a pair does not count.
        """
        # the difference of each answer first: exactly zero before the first step
        chosen, rejected = (self.beta * (policy - reference)).view(-1, 2).unbind(1)  # [p]
        margins = chosen - rejected
        losses = LOSSES[self.loss_type](margins, self.label_smoothing)
        figures = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": margins,
            "rewards/accuracies": (margins > 0).float(),
            "logps/chosen": policy[0::2],
            "logps/rejected": policy[1::2],
        }
        sums = torch.stack(list(figures.values())).detach() @ weights.float()
        return losses @ weights.float(), dict(zip(figures, sums.tolist(), strict=True))


def _are_pairs(labels: Tensor) -> Tensor:
    """[2 p, seq] -> bool [p]"""
    return (labels[0::2, 1:] != IGNORE_INDEX).any(1)


def check_reference(model: nn.Module) -> None:
    """Raises PlanError if something trains that is no adapter, so that the base would not stay the
    reference.
    """
    adapters = [module for module in model.modules() if isinstance(module, LoRALinear)]
    own = {id(parameter) for module in adapters for parameter in module.parameters()}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    others = [name for name, parameter in trained if id(parameter) not in own]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise PlanError(
            f"dpo trains adapters only: its reference is the base without them, and the plan "
            f"trains {others[0]}{more} of the base; use method=qlora or method=lora, without "
            "`train`, `train_tokens` and `trainable`"
        )
