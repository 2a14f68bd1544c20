"""Tokenizers of `tokenizer.json`: their regexes, normalizers and decoders are a stranger's."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain
from typing import Any

import tokenizers
from tokenizers.processors import TemplateProcessing

from qlora_builders.confined.process import WithBytes


def load(file: str) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """The tokenizer, to be kept, and what there is to know of it."""
    backend = tokenizers.Tokenizer.from_file(file)
    backend.encode("a")  # its parts may name tokens that are not there
    ids = backend.get_vocab(with_added_tokens=True).values()
    if not ids:
        return backend, {"vocab_size": 0}
    backend.no_truncation()
    backend.no_padding()
    prefix, suffix = _take_post_processor(backend)
    return backend, {
        "vocab_size": max(ids) + 1,
        "prefix": prefix,
        "suffix": suffix,
        "added": [
            (token_id, token.content, token.special)
            for token_id, token in backend.get_added_tokens_decoder().items()
        ],
    }


def encode(backend: tokenizers.Tokenizer, texts: list[str], with_offsets: bool) -> WithBytes:
    """The lengths, and as int32 the ids of all texts, then their offsets."""
    if len(texts) == 1:
        found = [backend.encode(texts[0], add_special_tokens=False)]
    else:
        found = backend.encode_batch(texts, add_special_tokens=False)
    ids = [encoding.ids for encoding in found]
    data = array("i", chain.from_iterable(ids)).tobytes()
    if with_offsets:
        pairs = chain.from_iterable(encoding.offsets for encoding in found)
        data += array("i", chain.from_iterable(pairs)).tobytes()
    return WithBytes([len(one) for one in ids], data)


def decode(backend: tokenizers.Tokenizer, ids: list[int], skip_special_tokens: bool) -> str:
    return backend.decode(ids, skip_special_tokens=skip_special_tokens)


def spellings(backend: tokenizers.Tokenizer, ids: Sequence[int]) -> list[str | None]:
    """How the vocabulary spells each; None where it does not hold the id."""
    return [backend.id_to_token(token_id) for token_id in ids]


def token_id(backend: tokenizers.Tokenizer, token: str) -> int | None:
    return backend.token_to_id(token)


def _take_post_processor(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """Ids that the post-processor puts before and after a text; it is then switched off.

    Byte-level post-processors trim white space off the offsets, also where no token is added, and
    the assistant mask needs exact ones.
    """
    full = list(backend.encode("a", add_special_tokens=True).ids)
    plain = list(backend.encode("a", add_special_tokens=False).ids)
    backend.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    extra = len(full) - len(plain)
    starts = [i for i in range(extra + 1) if full[i : i + len(plain)] == plain]
    first = starts[0] if starts else 0
    return full[:first], full[first + len(plain) :]
