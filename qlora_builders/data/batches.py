"""The batches of a run by number: which rows stand where is a function of seed and epoch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from qlora_builders.data.collate import Batch, batch_indices, collate, collate_packed, shuffled
from qlora_builders.data.dataset import TokenizedDataset


class Batches:
    """Batch `n` of a dataset, counted from 0 through all epochs.

    Nothing is remembered from one batch to the next, so a run that goes on at a step asks for that
    step's batches, and there is no position to save.

    Args:
        batch_size: rows per batch, over all ranks; a preference row is two sequences.
        packing: "none": a row is an example; "best_fit": as many as fit into `max_seq_len` tokens,
            each a document of its own (not for preference rows).
        max_seq_len: what `dataset` was cut to.
        shuffle: off, every epoch is the same, in the order of the source.
        rank, num_ranks: which part of every batch to give, of how many; see `Batch.part`.

    Attributes:
        rows_per_epoch: packed or not, the same for every epoch.
        per_epoch: batches of an epoch; the last one may be short.
    """

    def __init__(
        self,
        dataset: TokenizedDataset,
        *,
        batch_size: int,
        packing: str,
        max_seq_len: int,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.packing = packing
        self.max_seq_len = max_seq_len
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.num_ranks = num_ranks
        self._rows: list[list[int]] = []
        self._use_epoch(0)
        self.rows_per_epoch = len(self._rows) or len(dataset) // dataset.per_row
        self.per_epoch = len(self._order)

    def batch(self, number: int) -> Batch:
        epoch, index = divmod(number, self.per_epoch)
        if epoch != self._epoch:
            self._use_epoch(epoch)
        padding = {
            "pad_token_id": self.dataset.tokenizer.pad_token_id,
            "max_seq_len": self.max_seq_len,
        }
        if self.packing == "none":
            per_row = self.dataset.per_row
            first = [row * per_row for row in self._order[index]]
            examples = [self.dataset[i + j] for i in first for j in range(per_row)]
            batch = collate(examples, per_row=per_row, **padding)
        else:
            rows = [[self.dataset[i] for i in self._rows[row]] for row in self._order[index]]
            batch = collate_packed(rows, **padding)
        return batch.part(self.rank, self.num_ranks)

    def of_step(self, step: int, grad_accumulation: int, device: torch.device) -> list[Batch]:
        """The batches of one optimizer step; step 1 is the first. Epochs follow without a gap."""
        last = step * grad_accumulation
        return [self.batch(n).to(device) for n in range(last - grad_accumulation, last)]

    def of_epoch(self, epoch: int, device: torch.device) -> Iterator[Batch]:
        first = epoch * self.per_epoch
        return (self.batch(n).to(device) for n in range(first, first + self.per_epoch))

    def summary(self) -> str:
        """One line for a log: the data's, and how full packed rows are."""
        text = self.dataset.report.summary()
        if self.packing != "none":
            filled = len(self.dataset.input_ids) / (self.rows_per_epoch * self.max_seq_len)
            text += (
                f"; packed into {self.rows_per_epoch:,} rows of {self.max_seq_len:,} tokens, "
                f"{100 * filled:.1f} % full"
            )
        return text

    def _use_epoch(self, epoch: int) -> None:
        """Set the packed rows of an epoch, and its batches of row (or example) indices."""
        count = len(self.dataset) // self.dataset.per_row
        if self.packing != "none":
            in_order = list(range(count))
            order = shuffled(count, f"{self.seed}/{epoch}/packing") if self.shuffle else in_order
            lengths: list[int] = np.diff(self.dataset.offsets).tolist()
            self._rows = best_fit(lengths, self.max_seq_len, order=order)
            count = len(self._rows)
        self._order = batch_indices(
            count,
            batch_size=self.batch_size,
            seed=self.seed,
            epoch=epoch,
            shuffle=self.shuffle,
        )
        self._epoch = epoch


def best_fit(lengths: Sequence[int], capacity: int, *, order: Iterable[int]) -> list[list[int]]:
    """Best-fit decreasing: rows of example indices whose lengths add up to at most `capacity`.

    The longest example goes first, each into the fullest row that has room for it; no example is
    split. Which of several equally long examples goes first follows `order`, so that an epoch can
    mix them anew, while the number of rows depends on the lengths alone. A million examples take
    under two seconds. At most 22 % more rows than the best packing has (Johnson, 1973).

    Args:
        lengths: tokens of every example, each at most `capacity`.
        order: all indices of `lengths`.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # room left -> rows
    rooms = 0  # bit r is set while with_room[r] has a row
    for index in sorted(order, key=lambda index: -lengths[index]):
        length = lengths[index]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1  # the lowest bit: the best fit
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        with_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows
