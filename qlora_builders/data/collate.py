"""Examples to batches: which rows go together, padding, and several documents in one row."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlora_builders.errors import DataError

IGNORE_INDEX = -100  # a label that the loss leaves out, as in torch's cross_entropy
# Kernels are made and kept for every length: with oneDNN in bfloat16 a run over rows of up to 168
# tokens took 880 MiB instead of 666
PAD_MULTIPLE = 16


@dataclass(frozen=True)
class Example:
    """One row, tokenized.

    `labels[t]` is `input_ids[t]` where token t is to be predicted and -100 elsewhere; the loss
    does the shift. `row` is the row's number in its source, counted from 0.
    """

    input_ids: Tensor  # [seq] int64
    labels: Tensor  # [seq] int64
    row: int


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right to the longest of them, or a little more."""

    input_ids: Tensor  # [batch, seq] int64
    labels: Tensor  # [batch, seq] int64, -100 on padding
    rows: list[int]  # of all examples, in order
    document_ids: Tensor | None = None  # [batch, seq] int64, growing along a row; None: one each
    per_row: int = 1  # sequences that stay together: 2 where chosen and rejected answers alternate

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its tensors on `device`."""
        ids = None if self.document_ids is None else self.document_ids.to(device)
        inputs, labels = self.input_ids.to(device), self.labels.to(device)
        return replace(self, input_ids=inputs, labels=labels, document_ids=ids)

    def part(self, rank: int, num_ranks: int) -> Batch:
        """Every `num_ranks`-th row from `rank` on; one row without targets where there is none.

        `rows` stays that of the whole batch, of which packed rows hold several.
        """
        mine = [i for i in range(len(self.labels)) if i // self.per_row % num_ranks == rank]
        labels = self.labels[mine]
        if not mine:
            mine = list(range(self.per_row))
            labels = torch.full_like(self.labels[mine], IGNORE_INDEX)
        documents = None if self.document_ids is None else self.document_ids[mine]
        return replace(self, input_ids=self.input_ids[mine], labels=labels, document_ids=documents)


def collate(
    examples: Sequence[Example],
    *,
    pad_token_id: int,
    per_row: int = 1,
    max_seq_len: int | None = None,
) -> Batch:
    """Pad on the right. Every `per_row` examples belong together.

    With `max_seq_len` rows are padded to a multiple of `PAD_MULTIPLE`, or to that many tokens.

    Attention is causal, so what stands behind a sequence cannot reach it and no mask is needed:
    padding is left out of the loss by its label, never by its id.

    Raises:
        DataError: if there are no examples.
    """
    if not examples:
        raise DataError("cannot make a batch of no examples")
    longest = max(len(example.input_ids) for example in examples)
    if max_seq_len is not None:
        longest = max(longest, min(padded(longest), max_seq_len))
    shape = (len(examples), longest)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
    for i, example in enumerate(examples):
        input_ids[i, : len(example.input_ids)] = example.input_ids
        labels[i, : len(example.labels)] = example.labels
    rows = [example.row for example in examples[::per_row]]
    return Batch(input_ids, labels, rows, per_row=per_row)


def padded(num_tokens: int) -> int:
    """The next multiple of `PAD_MULTIPLE`."""
    return -(-num_tokens // PAD_MULTIPLE) * PAD_MULTIPLE


def collate_packed(
    rows: Sequence[Sequence[Example]], *, pad_token_id: int, max_seq_len: int | None = None
) -> Batch:
    """Join the examples of each row, then pad on the right as `collate` does.

    `document_ids` numbers the examples of a row from 0, padding coming last: the model keeps
    attention inside a document and counts positions from its start. The first token of a document
    is never a target, because what stands before it belongs to another one.

    Raises:
        DataError: if there are no rows, or one is empty.
    """
    if not all(rows):
        raise DataError("cannot make a row of no examples")
    joined = []
    for row in rows:
        labels = torch.cat([example.labels for example in row])
        starts = torch.tensor([0, *(len(example.labels) for example in row[:-1])]).cumsum(0)
        labels[starts] = IGNORE_INDEX
        joined.append(Example(torch.cat([x.input_ids for x in row]), labels, row[0].row))
    batch = collate(joined, pad_token_id=pad_token_id, max_seq_len=max_seq_len)
    document_ids = torch.zeros_like(batch.input_ids)
    for ids, row in zip(document_ids, rows, strict=True):
        ends = torch.tensor([len(example.input_ids) for example in row]).cumsum(0)
        ids += torch.searchsorted(ends, torch.arange(len(ids)), right=True)
    numbers = [example.row for row in rows for example in row]
    return Batch(batch.input_ids, batch.labels, numbers, document_ids)


def shuffled(count: int, seed: str) -> list[int]:
    """0 .. count - 1 in an order that depends on `seed` alone, on every platform and version.

    `Random.random` is the one stream that Python promises to keep.
    """
    draw = random.Random(seed).random
    keys = [draw() for _ in range(count)]
    return sorted(range(count), key=keys.__getitem__)


def batch_indices(
    num_examples: int, *, batch_size: int, seed: int, epoch: int, shuffle: bool = True
) -> list[list[int]]:
    """The example indices of every batch of an epoch; the last batch may be short.

    The order depends on `seed` and `epoch` alone.

    Raises:
        DataError: if there are no examples, or `batch_size` is not positive.
    """
    if num_examples < 1:
        raise DataError("cannot make batches of no examples")
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}; it has to be at least 1")
    order = shuffled(num_examples, f"{seed}/{epoch}") if shuffle else list(range(num_examples))
    return [order[i : i + batch_size] for i in range(0, num_examples, batch_size)]
