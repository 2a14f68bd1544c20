"""A `tokenizer.json`, which `confined.tokens` reads and applies in another process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qlora_builders.confined.process import Answer, Kept, Limits, OverrunError, RaisedError
from qlora_builders.confined.wire import Span
from qlora_builders.errors import DataError, UnsafeError

LIMITS = Limits()
_MOST_BYTES = 200 * 10**6  # six times the largest there are
_MEMORY_PER_BYTE = 400  # of text, beside what each request has; a token of one byte takes 270

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Encoding:
    """One text's tokens."""

    ids: Ids  # [n]
    offsets: Ids  # [n, 2], characters [start, end); [0, 2] if not asked for

    def inside(self, spans: Iterable[Span]) -> Mask:
        """True for each token that has a character inside a span."""
        starts, ends = self.offsets[:, 0], self.offsets[:, 1]
        found: Mask = np.zeros(len(self.offsets), dtype=np.bool_)
        for start, end in spans:
            # A token can stand for no character (a prefix space that the tokenizer adds); it goes
            # with the character after it.
            found |= (starts < end) & ((ends > start) | ((starts == ends) & (starts >= start)))
        return found


@dataclass(frozen=True)
class AddedToken:
    content: str
    special: bool


class TokenBackend:
    """What the Rust library knows of one file.

    Attributes:
        vocab_size: one more than the largest token id.
        added: by id, the tokens that are beside the model's vocabulary.
        prefix_ids, suffix_ids: what the post-processor puts around a text.

    Raises:
        DataError: if the file cannot be read, is too large, or holds no tokens.
        UnsafeError: if reading it takes more than the limits.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        size = file.stat().st_size
        if size > _MOST_BYTES:
            raise DataError(f"{file}: has {size:,} bytes; at most {_MOST_BYTES:,} are read")
        limits = replace(LIMITS.grown(size), seconds=LIMITS.seconds + size * 1e-6)
        try:
            self._kept = Kept("tokens.load", str(file.absolute()), limits=limits, rebase=True)
        except RaisedError as error:
            raise DataError(f"{file}: not a tokenizer.json this can read: {error}") from error
        except OverrunError as error:
            raise UnsafeError(f"{file}: reading it {error}; do not use this tokenizer") from error
        info = self._kept.info
        self.vocab_size: int = info["vocab_size"]
        if not self.vocab_size:
            raise DataError(f"{file}: holds no tokens; take the file of the model's own tokenizer")
        self.prefix_ids: list[int] = info["prefix"]
        self.suffix_ids: list[int] = info["suffix"]
        self.added = {i: AddedToken(content, special) for i, content, special in info["added"]}

    def encode(self, texts: Sequence[str], *, offsets: bool = True) -> list[Encoding]:
        """Without added special tokens.

        Raises:
            DataError: if the tokenizer fails on them.
        """
        if not texts:
            return []
        size = sum(len(text.encode(errors="surrogatepass")) for text in texts)
        limits = replace(LIMITS, memory=LIMITS.memory + size * _MEMORY_PER_BYTE)
        lengths, data = self._ask("encode", "texts", list(texts), offsets, limits=limits)
        numbers = np.frombuffer(data, dtype=np.int32)
        ends = np.cumsum(lengths)
        ids = np.split(numbers[: ends[-1]], ends[:-1])
        pairs = numbers[ends[-1] :].reshape(-1, 2)
        places = np.split(pairs, ends[:-1]) if offsets else [pairs] * len(ids)
        return [Encoding(*both) for both in zip(ids, places, strict=True)]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        text: str = self._ask("decode", "ids", list(ids), skip_special_tokens).value
        return text

    def tokens(self, ids: Sequence[int]) -> list[str | None]:
        """How the vocabulary spells each; None where it does not hold the id."""
        found: list[str | None] = self._ask("spellings", "ids", list(ids)).value
        return found

    def token_id(self, token: str | None) -> int | None:
        found: int | None = None
        if token is not None:
            found = self._ask("token_id", "a token", token).value
        return found

    def _ask(
        self, function: str, what: str, *arguments: Any, limits: Limits | None = None
    ) -> Answer:
        try:
            return self._kept.ask(f"tokens.{function}", *arguments, limits=limits or LIMITS)
        except RaisedError as error:
            raise DataError(f"{self.file}: the tokenizer fails on {what}: {error}") from error
        except OverrunError as error:
            raise UnsafeError(
                f"{self.file}: the tokenizer {error} for {what}; do not use this tokenizer"
            ) from error
