"""The tokenizer of a Hugging Face directory, without transformers.

Ids come from `tokenizer.json` through the Rust library; the files beside it say which ids begin,
end and pad a text, and hold the chat template. Encoding agrees with transformers' fast tokenizers:
the post-processor in `tokenizer.json` decides about BOS, and an `add_bos_token` in
`tokenizer_config.json` is ignored, as there. One difference: transformers 5 rebuilds the pipeline
of class LlamaTokenizer and drops the prefix space of a text that begins with a space; here the file
is taken as it stands, as sentencepiece and transformers 4 do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qlora_builders.confined.process import (
    Answer,
    Kept,
    Limits,
    Message,
    OverrunError,
    RaisedError,
    RenderedChat,
    Span,
)
from qlora_builders.data.chat_template import ChatTemplate, Conversation
from qlora_builders.errors import DataError, UnsafeError, expand_home
from qlora_builders.files.reading import parse_json

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


def check_text(text: str) -> None:
    """
    Raises:
        DataError: for half of a surrogate pair, which `"\\ud800"` in JSON can be, or a byte of a
            command line that is not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{text[error.start]!r}, character {error.start} of the text, is half of a surrogate "
            "pair and no character; write whole ones, in UTF-8"
        ) from error


class Tokenizer:
    """Text to token ids and back; conversations to text.

    Attributes:
        vocab_size: one more than the largest token id.
        bos_token_id, eos_token_id: None where the files name no such token.
        stop_token_ids: every id that ends a text or a turn, EOS first.
        stop_strings: the same, spelled out.
        pad_token_id: the named padding token, else a special token that ends nothing, else EOS.
            Padding is masked by position and never by id, so any id will do.
        chat_template: the template's source, or None.

    `Tokenizer.from_dir` is the way to make one.
    """

    def __init__(
        self,
        backend: TokenBackend,
        *,
        special_tokens: Mapping[str, str],
        extra_stop_ids: Iterable[int] = (),
        chat_template: str | None = None,
        template_origin: str = "chat template",
        max_pad_id: int | None = None,
        now: datetime | None = None,
    ) -> None:
        self._backend = backend
        self.vocab_size = backend.vocab_size
        self.bos_token_id = backend.token_id(special_tokens.get("bos_token"))
        self.eos_token_id = backend.token_id(special_tokens.get("eos_token"))
        self.chat_template = chat_template
        self._template: ChatTemplate | None = None
        if chat_template is not None:
            self._template = ChatTemplate(
                chat_template, special_tokens=special_tokens, origin=template_origin, now=now
            )
        stops = [self.eos_token_id, *extra_stop_ids, self._end_of_turn_id()]
        ids = [i for i in dict.fromkeys(stops) if i is not None]
        known = {i: s for i, s in zip(ids, backend.tokens(ids), strict=True) if s is not None}
        self.stop_token_ids: tuple[int, ...] = tuple(known)
        self.stop_strings: tuple[str, ...] = tuple(known.values())
        if self.eos_token_id is None and self.stop_token_ids:
            self.eos_token_id = self.stop_token_ids[0]
        pad = backend.token_id(special_tokens.get("pad_token"))
        self.pad_token_id = self._choose_pad(pad, max_pad_id)

    @classmethod
    def from_dir(cls, path: str | Path, *, now: datetime | None = None) -> Tokenizer:
        """Read `tokenizer.json` and the files beside it.

        Args:
            now: the date that the chat template prints; None: today's.

        Raises:
            DataError: if a file is missing or broken, a named token is not in the vocabulary, or
                the chat template is broken or unsafe.
        """
        folder = expand_home(path, DataError)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise DataError(_missing_tokenizer(folder))
        backend = TokenBackend(file)
        config = _read_json(folder / "tokenizer_config.json")
        named = _named_tokens(folder / "special_tokens_map.json")
        named |= _named_tokens(folder / "tokenizer_config.json")
        for key in ("bos_token", "eos_token"):
            token = named.get(key)
            if token is not None and backend.token_id(token) is None:
                raise DataError(
                    f"{folder / 'tokenizer_config.json'}: {key} is {token!r}, which {file.name} "
                    "does not hold; the two files do not belong together"
                )
        model_config = _read_json(folder / "config.json")
        generation = _read_json(folder / "generation_config.json")
        template, origin = _read_template(folder, config)
        for key in ("bos_token", "eos_token"):
            ids = _as_ids(generation.get(f"{key}_id")) or _as_ids(model_config.get(f"{key}_id"))
            token = backend.tokens(ids[:1])[0] if ids else None
            if token is not None and key not in config:  # null there means: none
                named.setdefault(key, token)
        stop_ids = [
            *_as_ids(generation.get("eos_token_id")),
            *_as_ids(model_config.get("eos_token_id")),
        ]
        vocab_size = model_config.get("vocab_size")
        return cls(
            backend,
            special_tokens=named,
            extra_stop_ids=stop_ids,
            chat_template=template,
            template_origin=origin,
            max_pad_id=vocab_size - 1 if isinstance(vocab_size, int) else None,
            now=now,
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids; special tokens spelled out in the text become their ids.

        Raises:
            DataError: for half of a surrogate pair.
        """
        check_text(text)
        (encoding,) = self._backend.encode([text], offsets=False)
        ids: list[int] = encoding.ids.tolist()
        if not add_special_tokens:
            return ids
        return [*self._backend.prefix_ids, *ids, *self._backend.suffix_ids]

    def encode_prefix(self, text: str) -> list[int]:
        """Token ids of a text that is to go on: what begins a text before it, nothing behind it.

        Raises:
            DataError: for half of a surrogate pair.
        """
        ids = self.encode(text, add_special_tokens=False)
        return [*self.special_tokens_around(ids)[0], *ids]

    def encode_batch(self, texts: Sequence[str], *, offsets: bool = True) -> list[Encoding]:
        """Encodings without added special tokens, on all cores.

        `.ids` are the ids and `.offsets`, if asked for, the exact characters [start, end) behind
        each of them.

        Raises:
            DataError: if the tokenizer fails on one of them.
        """
        return self._backend.encode(texts, offsets=offsets)

    def special_tokens_around(self, ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after a text with these ids: usually BOS and nothing.

        Unlike in `encode`, a BOS that the text itself spells out is not doubled.
        """
        before = self._backend.prefix_ids
        if before == [self.bos_token_id] and list(ids[:1]) == before:
            before = []
        return list(before), list(self._backend.suffix_ids)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of the ids."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token(self, token_id: int) -> str | None:
        """How the vocabulary spells an id, or None if it does not hold it."""
        return self._backend.tokens([token_id])[0]

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The conversation as text; encode it with `add_special_tokens=False`.

        Raises:
            DataError: if there is no chat template, or it refuses the messages.
        """
        return self._required_template().render(
            messages, add_generation_prompt=add_generation_prompt, tools=tools
        )

    def render_each(self, conversations: Sequence[Conversation]) -> list[RenderedChat | DataError]:
        """Conversations as text with the characters that are trained on, or what is wrong.

        Raises:
            DataError: if there is no chat template.
        """
        return self._required_template().render_each(conversations, stop_strings=self.stop_strings)

    def _required_template(self) -> ChatTemplate:
        if self._template is None:
            raise DataError(
                "the tokenizer has no chat template: put a chat_template.jinja beside its "
                "tokenizer.json, or use data.format=instruct or data.format=text"
            )
        return self._template

    def _end_of_turn_id(self) -> int | None:
        """The added token with which the template ends an assistant turn, if it does."""
        if self._template is None:
            return None
        tail = self._template.end_of_turn_text().lstrip()
        found = [
            (len(token.content), token_id)
            for token_id, token in self._backend.added.items()
            if token.content.strip() and tail.startswith(token.content)
        ]
        token_id = max(found)[1] if found else None
        return None if token_id == self.bos_token_id else token_id

    def _choose_pad(self, named: int | None, max_id: int | None) -> int:
        # A [PAD] added behind the vocabulary, without a row in the embedding, is a common accident.
        def usable(token_id: int | None) -> bool:
            return token_id is not None and (max_id is None or token_id <= max_id)

        spared = {self.bos_token_id, *self.stop_token_ids}
        special = [i for i, token in sorted(self._backend.added.items()) if token.special]
        others = [i for i in special if i not in spared]
        others.sort(key=lambda i: "pad" not in self._backend.added[i].content.lower())
        for candidate in (named, *others, self.eos_token_id):
            if candidate is not None and usable(candidate):
                return candidate
        return 0


def _missing_tokenizer(folder: Path) -> str:
    if not folder.is_dir():
        return (
            f"no such directory: {folder}; set checkpoint.dir (or tokenizer.path) to one that "
            "exists: models of the hub have to be downloaded first"
        )
    message = f"no tokenizer.json in {folder}; "
    if (folder / "tokenizer.model").is_file():
        message += (
            "its tokenizer.model has to be converted once: AutoTokenizer.from_pretrained(DIR)"
            ".save_pretrained(DIR) in transformers writes the file"
        )
    else:
        message += "set tokenizer.path to a directory that holds one"
    return message


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no such file."""
    if not file.is_file():
        return {}
    try:
        value = parse_json(file.read_bytes())
    except ValueError as error:
        raise DataError(f"{file}: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{file}: holds a {type(value).__name__}, and an object is needed")
    return value


def _named_tokens(file: Path) -> dict[str, str]:
    """`bos_token`, `eos_token` ...: spelled as a string, or as an object with `content`."""
    config, named = _read_json(file), {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = config.get(key)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            try:
                check_text(value)
            except DataError as error:
                raise DataError(f"{file}: {key}: {error}") from error
            named[key] = value
    return named


def _as_ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if type(v) is int and 0 <= v < 2**32]


def _read_template(folder: Path, config: Mapping[str, Any]) -> tuple[str | None, str]:
    """The chat template and the file it is from; `chat_template.jinja` wins."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8"), str(file)
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: not UTF-8 text: {error.reason} at {error.start}") from error
    origin = str(folder / "tokenizer_config.json")
    template = config.get("chat_template")
    if template is None or isinstance(template, str):
        return template, origin
    if isinstance(template, list):
        named = {
            str(entry["name"]): entry["template"]
            for entry in template
            if isinstance(entry, dict) and {"name", "template"} <= set(entry)
        }
        if isinstance(named.get("default"), str):
            return named["default"], origin
        raise DataError(
            f"{origin}: chat_template has no entry named 'default' with text (it has: "
            f"{', '.join(sorted(named)) or 'none'}); write the one to use to chat_template.jinja"
        )
    raise DataError(
        f"{origin}: chat_template is a {type(template).__name__}; a string or a list of "
        "{name, template} is allowed"
    )
