"""What a step minimizes: a mean over something countable, so that any split of it adds up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from qlora_builders.modules import CausalLM, num_target_tokens


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
