"""Direct Preference Optimization (https://arxiv.org/abs/2305.18290) with the base as reference.

The implicit reward of an answer y to a prompt x is

    r(x, y) = beta * (log p(y | x) - log p_ref(y | x))

and the loss makes the chosen answer's larger than the rejected one's. p is the base with its
adapters, p_ref the same base without them: there is no second model, and nothing to load for it.

Shapes: p = pairs. A batch has 2 p sequences: chosen, rejected, chosen, rejected ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_builders.errors import ConfigError, PlanError, did_you_mean
from qlora_builders.modules import IGNORE_INDEX, CausalLM, LoRALinear, adapters_disabled
from qlora_builders.training.objective import Batch


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

    Raises:
        ConfigError: for an unknown `loss_type`.
    """

    beta: float = 0.1
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.loss_type not in LOSSES:
            hint = did_you_mean(self.loss_type, LOSSES)
            raise ConfigError(f"dpo.loss_type is {self.loss_type!r}{hint}")

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
    """
    Raises:
        PlanError: if something trains that is no adapter, so that the base would not stay the
            reference.
    """
    adapters = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, LoRALinear)
        for parameter in module.parameters()
    }
    others = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in adapters
    ]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise PlanError(
            f"dpo trains adapters only: its reference is the base without them, and the plan "
            f"trains {others[0]}{more} of the base; use method=qlora or method=lora, without "
            "`train`, `train_tokens` and `trainable`"
        )
