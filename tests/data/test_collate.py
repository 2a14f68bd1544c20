"""Batches are padded by position, and their order depends on seed and epoch alone."""

from __future__ import annotations

import random

import pytest
import torch

from qlora_builders.data import IGNORE_INDEX, Batch, Example, batch_indices, collate
from qlora_builders.errors import DataError


def example(length: int, row: int) -> Example:
    ids = torch.arange(1, length + 1)
    return Example(ids, ids.clone(), row)


def test_collate_pads_on_the_right() -> None:
    batch = collate([example(2, 7), example(4, 3)], pad_token_id=2)
    assert batch.input_ids.tolist() == [[1, 2, 2, 2], [1, 2, 3, 4]]
    # The pad id is a real token of the first example too: only positions are masked.
    assert batch.labels.tolist() == [[1, 2, -100, -100], [1, 2, 3, 4]]
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.rows == [7, 3]


@pytest.mark.parametrize(
    ("longest", "limit", "expected"),
    [(5, 512, 16), (16, 512, 16), (17, 512, 32), (17, 20, 20), (20, 20, 20), (33, 20, 33)],
)
def test_lengths_are_few(longest: int, limit: int, expected: int) -> None:
    batch = collate([example(longest, 0), example(3, 1)], pad_token_id=9, max_seq_len=limit)
    assert batch.input_ids.shape == batch.labels.shape == (2, expected)
    assert (batch.labels[0, longest:] == IGNORE_INDEX).all()
    assert batch.labels[0, :longest].tolist() == list(range(1, longest + 1))


def test_batch_to_moves_both_tensors() -> None:
    batch = collate([example(2, 0)], pad_token_id=0).to("meta")
    assert batch.input_ids.device.type == batch.labels.device.type == "meta"
    assert batch.rows == [0]


def test_collate_of_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="batch of no examples"):
        collate([], pad_token_id=0)


def test_every_example_once_and_the_short_batch_kept() -> None:
    batches = batch_indices(10, batch_size=4, seed=0, epoch=0)
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert sorted(i for batch in batches for i in batch) == list(range(10))


def test_order_depends_on_seed_and_epoch_only() -> None:
    first = batch_indices(50, batch_size=8, seed=3, epoch=1)
    random.seed(9)
    torch.manual_seed(9)
    assert batch_indices(50, batch_size=8, seed=3, epoch=1) == first
    assert batch_indices(50, batch_size=8, seed=3, epoch=2) != first
    assert batch_indices(50, batch_size=8, seed=4, epoch=1) != first
    assert batch_indices(50, batch_size=8, seed=31, epoch=1) != first


def test_order_is_pinned() -> None:
    # Resuming a run with a later version has to see the same order.
    assert batch_indices(8, batch_size=8, seed=0, epoch=0) == [[0, 3, 7, 4, 1, 5, 2, 6]]


def test_unshuffled_order() -> None:
    assert batch_indices(3, batch_size=2, seed=0, epoch=0, shuffle=False) == [[0, 1], [2]]


def test_impossible_batches_are_refused() -> None:
    with pytest.raises(DataError, match="batches of no examples"):
        batch_indices(0, batch_size=1, seed=0, epoch=0)
    with pytest.raises(DataError, match="batch_size is 0; it has to be at least 1"):
        batch_indices(3, batch_size=0, seed=0, epoch=0)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_parts_of_a_batch_have_each_row_once(num_ranks: int) -> None:
    ids = torch.arange(12).view(3, 4)
    batch = Batch(ids, ids + 100, [7, 8, 9], document_ids=ids % 2)
    parts = [batch.part(rank, num_ranks) for rank in range(num_ranks)]
    with_targets = [part for part in parts if (part.labels != IGNORE_INDEX).any()]
    assert len(with_targets) == min(num_ranks, 3)
    found = torch.cat([part.input_ids for part in with_targets])
    assert torch.equal(found.sort(dim=0).values, ids)
    for part in parts:  # those without a row of their own too
        assert part.input_ids.shape == part.labels.shape == part.document_ids.shape
        assert len(part.input_ids) > 0
        assert part.rows == [7, 8, 9]
    for part in with_targets:
        assert torch.equal(part.labels, part.input_ids + 100)
        assert torch.equal(part.document_ids, part.input_ids % 2)
