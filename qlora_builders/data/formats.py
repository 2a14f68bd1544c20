"""One row to one document: text, and which of its characters are trained on.

Three formats: `text` (one column), `instruct` (a prompt and a completion column) and `chat`
(a column of messages, OpenAI's or ShareGPT's). A row of the fourth, `preference`, becomes two
documents: the same conversation with the chosen and with the rejected answer at its end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qlora_builders.confined.rendered import Span
from qlora_builders.data.files import Row
from qlora_builders.data.messages import (
    DEFAULT_COLUMNS,
    asked_columns,
    check_row,
    column_name,
    text_column,
    to_messages,
    to_pair,
    tools_of,
)
from qlora_builders.data.tokenizer import Tokenizer, check_text
from qlora_builders.errors import DataError, did_you_mean

FORMATS = ("chat", "instruct", "text", "preference")
TRAIN_ON = ("assistant", "completion", "all")


@dataclass(frozen=True)
class Document:
    """Text to encode.

    `spans` are the trained characters (None: all of them). `add_special_tokens` asks for the
    tokenizer's own BOS, which a chat template has already written; `append_eos` for an EOS at the
    end, always trained.

    Raises:
        DataError: for text that is not Unicode.
    """

    text: str
    spans: list[Span] | None
    add_special_tokens: bool
    append_eos: bool

    def __post_init__(self) -> None:
        check_text(self.text)


@dataclass(frozen=True)
class Prompt:
    """Something to answer.

    Attributes:
        ids: the tokens up to where the answer begins.
        asked: `{"prompt": ...}`, with `system` where there is such a message, or
            `{"messages": [...]}`.
        reference: the answer that the row has, or None.
        where: file and line, as the beginning of a message; empty for one of no file.
        others: the columns of the row that are neither asked nor the reference.
    """

    ids: list[int]
    asked: dict[str, Any]
    reference: str | None
    where: str = ""
    others: Row = field(default_factory=dict)

    @property
    def last_message(self) -> str:
        """What was said last, which is the whole of a prompt."""
        prompt = self.asked.get("prompt")
        return self.asked["messages"][-1]["content"] if prompt is None else prompt


def check_format(
    format: str, train_on: str, columns: Mapping[str, str | None] | None
) -> dict[str, str | None]:
    """The columns with their defaults filled in.

    Raises:
        DataError: if the format, `train_on` or a key of `columns` is not one there is.
    """
    if format not in FORMATS:
        raise DataError(f"data.format is {format!r}{did_you_mean(format, FORMATS)}")
    if train_on not in TRAIN_ON:
        raise DataError(f"data.train_on is {train_on!r}{did_you_mean(train_on, TRAIN_ON)}")
    for key in columns or {}:
        if key not in DEFAULT_COLUMNS:
            raise DataError(f"data.columns has no {key!r}{did_you_mean(key, DEFAULT_COLUMNS)}")
    return {**DEFAULT_COLUMNS, **(columns or {})}


def documents_per_row(format: str) -> int:
    return 2 if format == "preference" else 1


def to_documents(
    row: Row,
    tokenizer: Tokenizer,
    *,
    format: str,
    train_on: str,
    columns: Mapping[str, str | None],
) -> list[Document]:
    """`documents_per_row` documents: one, or the chosen and the rejected one, of which the last
    answer is trained. `columns` is what `check_format` gives.

    Raises:
        DataError: if the row is no object, a column or a role is not there, or nothing in it could
            be trained on.
    """
    check_row(row)
    if format != "preference":
        return [to_document(row, tokenizer, format=format, train_on=train_on, columns=columns)]
    plain = tokenizer.chat_template is None and _is_text(row, columns)
    return [
        _conversation(messages, tokenizer, train_on="completion", plain=plain, tools=tools_of(row))
        for messages in to_pair(row, columns=columns)
    ]


def to_document(
    row: Row,
    tokenizer: Tokenizer,
    *,
    format: str,
    train_on: str,
    columns: Mapping[str, str | None],
) -> Document:
    """The row's text and trained characters. `columns` is what `check_format` gives.

    Raises:
        DataError: if a column or a role is not there, or nothing in the row could be trained on.
    """
    if format == "text":
        text = text_column(row, column_name(columns, "text"), empty_allowed=False)
        return Document(text, None, add_special_tokens=True, append_eos=True)
    messages = to_messages(row, format=format, columns=columns)
    plain = format == "instruct" and tokenizer.chat_template is None
    tools = None if plain else tools_of(row)
    return _conversation(messages, tokenizer, train_on=train_on, plain=plain, tools=tools)


def _conversation(
    messages: list[dict[str, Any]],
    tokenizer: Tokenizer,
    *,
    train_on: str,
    plain: bool,
    tools: list[Mapping[str, Any]] | None,
) -> Document:
    """Through the chat template, or `plain`: a line per message before the last one."""
    last = messages[-1]
    if plain:
        prompt = _plain_prompt(messages[:-1])
        text = prompt + last["content"]
        spans = None if train_on == "all" else [(len(prompt), len(text))]
        return Document(text, spans, add_special_tokens=True, append_eos=True)
    if not any(message["role"] == "assistant" for message in messages) and train_on != "all":
        raise DataError(
            "the conversation has no assistant turn, so nothing in it is trained on; remove the "
            "row or set data.train_on=all"
        )
    if train_on == "all":
        text = tokenizer.render_chat(messages, tools=tools)
        closed = last["role"] != "assistant" or text.rstrip().endswith(tokenizer.stop_strings)
        return Document(text, None, add_special_tokens=False, append_eos=not closed)
    chat = tokenizer.render_chat_with_spans(
        messages, last_only=train_on == "completion", tools=tools
    )
    if not chat.spans:
        raise DataError(
            "the chat template marks no text with {% generation %}, so nothing is trained on; "
            "mark the assistant's text in the template, or remove the tags from it"
        )
    return Document(chat.text, chat.spans, add_special_tokens=False, append_eos=chat.needs_eos)


def prompt_and_answer(
    row: Row, tokenizer: Tokenizer, *, format: str, columns: Mapping[str, str | None]
) -> Prompt:
    """What comes before the last assistant turn, with the text of that turn as its reference (of
    the chosen one, where there are two).

    Raises:
        DataError: if the format has no answers, or the row none.
    """
    if format == "text":
        raise DataError("data.format=text has no prompts to answer; use instruct or chat")
    if format == "preference":
        messages, is_text = to_pair(row, columns=columns)[0], _is_text(row, columns)
    else:
        messages, is_text = to_messages(row, format=format, columns=columns), format == "instruct"
    plain = is_text and tokenizer.chat_template is None
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise DataError("the conversation has no assistant turn to compare an answer with")
    before, answer = messages[: turns[-1]], messages[turns[-1]].get("content") or ""
    tools = None if plain else tools_of(row)
    ids = encode_prompt(before, tokenizer, plain=plain, tools=tools)
    return Prompt(ids, asked_columns(before, conversation=not is_text), answer)


def encode_prompt(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    plain: bool,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """Token ids up to where the answer to `messages` begins, which are those of training.

    Through the chat template, or `plain`: a line per message.

    Raises:
        DataError: if there is no chat template for what is not plain, or it refuses the messages.
    """
    if plain:
        return tokenizer.encode_prefix(_plain_prompt(messages))
    text = tokenizer.render_chat(messages, add_generation_prompt=True, tools=tools)
    return tokenizer.encode(text, add_special_tokens=False)


def _is_text(row: Row, columns: Mapping[str, str | None]) -> bool:
    """Whether a preference row holds no messages."""
    names = (column_name(columns, key) for key in ("prompt", "chosen", "rejected"))
    return all(isinstance(row.get(name), str) for name in names)


def _plain_prompt(messages: Sequence[Mapping[str, Any]]) -> str:
    """What stands before the completion when there is no chat template: a line per message."""
    return "".join(f"{message['content']}\n" for message in messages)
