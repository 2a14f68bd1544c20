"""A file or hub dataset as token ids and labels, held compactly.

Everything that can be wrong with data is found here, before the first step: rows that train on
nothing, rows cut short, ids the model does not have.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from qlora_builders.data.collate import IGNORE_INDEX, Example
from qlora_builders.data.files import Row, describe_row, load_rows
from qlora_builders.data.formats import (
    Document,
    Part,
    Prompt,
    check_format,
    documents_per_row,
    prompt_and_answer,
    rendered,
    to_parts,
)
from qlora_builders.data.tokenizer import Encoding, Ids, Mask, Tokenizer
from qlora_builders.errors import DataError, UnsafeError, counted, did_you_mean
from qlora_builders.names import ON_ERROR

_SAME = "both answers are the same"
_SHOWN = 5  # skipped rows of which the reason is told
_CHUNK = 512  # rows per call of the Rust tokenizer: enough to keep all cores busy

Read = list[tuple[int, list[Part] | DataError]]  # numbered rows
Rows = list[tuple[int, list[Document]]]


@dataclass
class DatasetReport:
    """What became of the rows. Token counts are those kept, after truncation.

    A preference row is one example, of two sequences.
    """

    source: str
    rows: int = 0
    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    truncated_rows: int = 0
    cut_tokens: int = 0
    longest_row: int = 0  # tokens, before truncation
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> rows
    skipped_rows: int = 0  # that cannot be used, with on_error="skip"
    skipped: list[str] = field(default_factory=list)  # where the first of them are, and why

    def skip(self, reason: str) -> None:
        self.skipped_rows += 1
        if len(self.skipped) < _SHOWN:
            self.skipped.append(reason)

    def summary(self) -> str:
        """One line for a log."""
        share = 100 * self.trained_tokens / max(self.tokens, 1)
        text = (
            f"{self.source}: {counted(self.examples, 'example')}, {counted(self.tokens, 'token')}, "
            f"{self.trained_tokens:,} trained ({share:.0f} %)"
        )
        if self.truncated_rows:
            text += (
                f"; {counted(self.truncated_rows, 'row')} truncated, "
                f"{counted(self.cut_tokens, 'token')} cut"
            )
        for reason, count in sorted(self.dropped.items()):
            text += f"; {counted(count, 'row')} dropped: {reason}"
        if self.skipped_rows:
            text += f"; {self.skipped_summary()}"
        return text

    def skipped_summary(self) -> str:
        """How many, where the first of them are and what is wrong with them."""
        more = self.skipped_rows - len(self.skipped)
        reasons = [reason.removeprefix(f"{self.source}, ") for reason in self.skipped]
        if more:
            reasons.append(f"and {more:,} more")
        skipped = counted(self.skipped_rows, "row")
        return f"{skipped} skipped (data.on_error=skip): {'; '.join(reasons)}"


class TokenizedDataset(Sequence[Example]):
    """Examples in a few flat arrays (5 bytes per token, 16 per example), sliced on access.

    `report` counts what was kept, cut and dropped. `per_row` examples come from each row, one
    after the other: the chosen and the rejected answer in format `preference`, else one.
    """

    def __init__(
        self,
        *,
        input_ids: Ids,
        trained: Mask,
        offsets: npt.NDArray[np.int64],
        row_numbers: npt.NDArray[np.int64],
        report: DatasetReport,
        rows: Sequence[Row],
        tokenizer: Tokenizer,
        format: str,
        columns: Mapping[str, str | None],
    ) -> None:
        self.input_ids = input_ids  # [tokens], all examples end to end
        self.trained = trained  # [tokens], True where the token is to be predicted
        self.offsets = offsets  # [examples + 1], example i is tokens offsets[i]:offsets[i + 1]
        self.row_numbers = row_numbers  # [examples], in the source, counted from 0
        self.report = report
        self.tokenizer = tokenizer
        self.per_row = documents_per_row(format)
        self._rows = rows
        self._format = format
        self._columns = columns

    def __len__(self) -> int:
        return len(self.row_numbers)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # no slices
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        span = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        input_ids = torch.from_numpy(self.input_ids[span].astype(np.int64))
        labels = input_ids.masked_fill(~torch.from_numpy(self.trained[span]), IGNORE_INDEX)
        return Example(input_ids, labels, int(self.row_numbers[index]))

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def fingerprint(self) -> str:
        """A name for the tokens, their labels and their order, whatever file they came from."""
        digest = hashlib.sha256()
        for array in (self.offsets, self.input_ids, self.trained):
            digest.update(array.data)
        return f"{len(self)} examples, sha256 {digest.hexdigest()[:16]}"

    def prompt_and_answer(self, index: int) -> Prompt:
        """What example `index` asks before its last assistant turn, and that turn's text.

        The row is read again, so nothing is truncated.

        Raises:
            DataError: if the format is `text`, or the row has no assistant turn.
        """
        number = int(self.row_numbers[index])
        try:
            return prompt_and_answer(
                self._rows[number], self.tokenizer, format=self._format, columns=self._columns
            )
        except DataError as error:
            raise DataError(f"{self.describe_row(number)}: {error}") from error

    def describe_row(self, number: int) -> str:
        """Where row `number` (as in `Example.row`) is in the source, for a message."""
        return describe_row(self._rows, self.report.source, number)


def build_dataset(
    source: str | Path,
    tokenizer: Tokenizer,
    *,
    format: str,
    max_seq_len: int,
    train_on: str = "assistant",
    columns: Mapping[str, str | None] | None = None,
    max_rows: int | None = None,
    on_error: str = "raise",
    split: str = "train",
) -> TokenizedDataset:
    """Read, render and tokenize the rows of `source` (see `load_rows` for what it can be).

    A row longer than `max_seq_len` tokens is cut at its end. If nothing trained is left of it, it
    is dropped, as is a preference row whose two answers are the same. All is counted in `.report`.
    `max_rows` takes the first rows only. `on_error="skip"` leaves out rows that are broken or train
    on nothing even uncut, and counts them.

    Raises:
        DataError: for such a row without that, if there are no rows, or if none is left; the
            message names the source and the row.
    """
    all_columns = check_format(format, train_on, columns)
    if max_seq_len < 2:
        raise DataError(f"data.max_seq_len is {max_seq_len}; at least 2 tokens are needed")
    if max_rows is not None and max_rows < 1:
        raise DataError(f"data.max_rows is {max_rows}; at least 1 is needed (null: all)")
    if on_error not in ON_ERROR:
        raise DataError(f"data.on_error is {on_error!r}{did_you_mean(on_error, ON_ERROR)}")
    if format == "chat" and tokenizer.chat_template is None:
        tokenizer.render_chat([])  # raises, and says what to do
    rows = load_rows(source, split=split)
    builder = _Builder(tokenizer, max_seq_len, str(source), rows, on_error)
    pending: Read = []
    unread = iter(rows)
    for number in range(len(rows) if max_rows is None else min(len(rows), max_rows)):
        try:
            row = next(unread)
        except DataError as error:  # names the row itself
            pending.append((number, error))
        else:
            pending.append((number, builder.parts(number, row, format, train_on, all_columns)))
        if len(pending) == _CHUNK:
            builder.add(pending)
            pending = []
    builder.add(pending)
    return builder.finish(format, all_columns)


def check_token_range(dataset: TokenizedDataset, vocab_size: int) -> None:
    """Check that the model has a row for every token id that training will look up.

    Raises:
        DataError: naming the token and the first row that holds it.
    """
    tokenizer = dataset.tokenizer
    advice = "tokenizer and model do not belong together; set tokenizer.path to the model's own"
    if int(dataset.input_ids.max()) >= vocab_size:
        at = int(np.argmax(dataset.input_ids >= vocab_size))
        index = int(np.searchsorted(dataset.offsets, at, side="right")) - 1
        token_id, row = int(dataset.input_ids[at]), int(dataset.row_numbers[index])
        raise DataError(
            f"{dataset.describe_row(row)}: token {tokenizer.token(token_id)!r} has id {token_id}, "
            f"but the model's vocabulary has {vocab_size} entries; {advice}"
        )
    pad = tokenizer.pad_token_id
    if pad >= vocab_size:
        raise DataError(
            f"the padding token {tokenizer.token(pad)!r} has id {pad}, but the model's vocabulary "
            f"has {vocab_size} entries; {advice}, or name another pad_token"
        )


class _Builder:
    """Gathers encoded documents into flat arrays and counts."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_seq_len: int,
        source: str,
        rows: Sequence[Row],
        on_error: str,
    ) -> None:
        self.on_error = on_error
        self.tokenizer = tokenizer
        self.max_seq_len = max_seq_len
        self.rows = rows
        self.report = DatasetReport(source)
        self.ids: list[Ids] = []
        self.trained: list[Mask] = []
        self.lengths: list[int] = []
        self.row_numbers: list[int] = []

    def refuse(self, number: int, error: DataError) -> None:
        """A row that cannot be used: raise, or skip and count it."""
        if self.on_error == "raise" and number == 0:
            raise error  # the next ones are probably like it
        if self.on_error == "raise":
            raise DataError(f"{error}; data.on_error=skip leaves such rows out") from error
        self.report.rows += 1
        self.report.skip(str(error))

    def parts(
        self, number: int, row: Row, format: str, train_on: str, columns: Mapping[str, str | None]
    ) -> list[Part] | DataError:
        """`to_parts`, or what it raises and where."""
        try:
            return to_parts(row, self.tokenizer, format=format, train_on=train_on, columns=columns)
        except DataError as error:
            return self._located(number, error)

    def add(self, read: Read) -> None:
        """Render and encode rows, and keep what is left of them after truncation."""
        kept: list[tuple[Ids, Mask]] = []
        for number, documents, encodings in self._encoded(self._rendered(read)):
            parts = [self._encode(*both) for both in zip(documents, encodings, strict=True)]
            if not all(trained.any() for _, trained in parts):
                where = describe_row(self.rows, self.report.source, number)
                advice = "remove the row, or set data.train_on=all"
                self.refuse(number, DataError(f"{where}: no token is trained on; {advice}"))
                continue
            self.report.rows += 1
            reason = self._truncate(parts)
            if reason is not None:
                self.report.dropped[reason] += 1
                continue
            kept += parts
            self.lengths += [len(ids) for ids, _ in parts]
            self.row_numbers += [number] * len(parts)
        if kept:
            self.ids.append(np.concatenate([ids for ids, _ in kept]))
            self.trained.append(np.concatenate([trained for _, trained in kept]))

    def _rendered(self, read: Read) -> Rows:
        """Those that can be; the others are refused, in their order."""
        found = rendered([parts for _, parts in read if isinstance(parts, list)], self.tokenizer)
        left = iter(found)
        rows: Rows = []
        for number, parts in read:
            documents = parts if isinstance(parts, DataError) else next(left)
            if isinstance(documents, UnsafeError):
                raise self._located(number, documents) from documents  # no fault of the row
            if isinstance(documents, DataError):
                if isinstance(parts, list):
                    documents = self._located(number, documents)
                self.refuse(number, documents)
            else:
                rows.append((number, documents))
        return rows

    def _located(self, number: int, error: DataError) -> DataError:
        return DataError(f"{describe_row(self.rows, self.report.source, number)}: {error}")

    def _encoded(self, rows: Rows) -> Iterator[tuple[int, list[Document], list[Encoding]]]:
        """Rows with their encodings; one that the tokenizer fails on is refused."""
        texts = [document.text for _, documents in rows for document in documents]
        offsets = any(d.spans is not None for _, documents in rows for d in documents)
        where = describe_row(self.rows, self.report.source, rows[0][0]) if rows else ""
        try:
            found = iter(self.tokenizer.encode_batch(texts, offsets=offsets))
        except UnsafeError as error:
            raise UnsafeError(f"{where}, and {len(rows) - 1:,} after it: {error}") from error
        except DataError as error:
            if len(rows) > 1:
                for row in rows:
                    yield from self._encoded([row])
            else:
                self.refuse(rows[0][0], DataError(f"{where}: {error}"))
            return
        for number, own in rows:
            yield number, own, list(islice(found, len(own)))

    def _truncate(self, parts: list[tuple[Ids, Mask]]) -> str | None:
        """Cut what comes from one row, in place; why it is not to be kept, if so."""
        longest = max(len(ids) for ids, _ in parts)
        self.report.longest_row = max(self.report.longest_row, longest)
        if longest > self.max_seq_len:
            self.report.truncated_rows += 1
            self.report.cut_tokens += sum(max(0, len(i) - self.max_seq_len) for i, _ in parts)
            parts[:] = [(i[: self.max_seq_len], t[: self.max_seq_len]) for i, t in parts]
            if not all(trained.any() for _, trained in parts):
                return f"nothing trained in {self.max_seq_len} tokens"
        if len(parts) == 2 and np.array_equal(parts[0][0], parts[1][0]):
            return _SAME
        return None

    def finish(self, format: str, columns: Mapping[str, str | None]) -> TokenizedDataset:
        """The dataset of everything added.

        Raises:
            DataError: if nothing was added, or nothing was kept.
        """
        report = self.report
        if not report.rows:
            raise DataError(f"{report.source}: there are no rows")
        if report.skipped_rows == report.rows:
            raise DataError(f"{report.source}: no row is left: {report.skipped_summary()}")
        if not self.lengths:
            if _SAME in report.dropped:
                raise DataError(
                    f"{report.source}: {counted(report.rows, 'row')}, and in none the two answers "
                    f"differ in the first data.max_seq_len={self.max_seq_len} tokens"
                )
            raise DataError(
                f"{report.source}: {counted(report.rows, 'row')}, and none has anything left to "
                f"train on after truncation to data.max_seq_len={self.max_seq_len}: the prompts "
                f"alone are longer; raise it (the longest row has {report.longest_row} tokens)"
            )
        input_ids, trained = np.concatenate(self.ids), np.concatenate(self.trained)
        report.examples = len(self.lengths) // documents_per_row(format)
        report.tokens = len(input_ids)
        report.trained_tokens = int(trained.sum())
        return TokenizedDataset(
            input_ids=input_ids,
            trained=trained,
            offsets=np.cumsum([0, *self.lengths], dtype=np.int64),
            row_numbers=np.array(self.row_numbers, dtype=np.int64),
            report=report,
            rows=self.rows,
            tokenizer=self.tokenizer,
            format=format,
            columns=columns,
        )

    def _encode(self, document: Document, encoding: Encoding) -> tuple[Ids, Mask]:
        ids = encoding.ids
        if document.spans is None:
            trained = np.ones(len(ids), dtype=np.bool_)
        else:
            trained = encoding.inside(document.spans)
        before: list[int] = []
        after: list[int] = []
        if document.add_special_tokens:
            before, after = self.tokenizer.special_tokens_around(encoding.ids[:1].tolist())
        if document.append_eos:
            eos = self.tokenizer.eos_token_id
            if eos is None:
                raise DataError(
                    "the tokenizer names no EOS token, so the model could not learn to stop; add "
                    "eos_token to its tokenizer_config.json"
                )
            if [*encoding.ids[-1:].tolist(), *after][-1:] != [eos]:
                after = [*after, eos]
        ids = np.concatenate([np.array(x, dtype=np.int32) for x in (before, ids, after)])
        trained = np.pad(trained, (len(before), len(after)))
        if document.append_eos:
            trained[-1] = True
        trained[:1] = False  # nothing comes before it to predict it from
        return ids, trained
