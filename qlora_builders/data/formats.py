"""One row to one document: text, and which of its characters are trained on.

Three formats: `text` (one column), `instruct` (a prompt and a completion column) and `chat`
(a column of messages, OpenAI's or ShareGPT's). A row of the fourth, `preference`, becomes two
documents: the same conversation with the chosen and with the rejected answer at its end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qlora_builders.confined.process import RenderedChat, Span
from qlora_builders.data.chat_template import Conversation
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
from qlora_builders.errors import DataError, UnsafeError, did_you_mean
from qlora_builders.names import DATA_FORMATS, TRAIN_ON


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


Part = Document | Conversation  # one that the chat template has to render


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
    if format not in DATA_FORMATS:
        raise DataError(f"data.format is {format!r}{did_you_mean(format, DATA_FORMATS)}")
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
    parts = to_parts(row, tokenizer, format=format, train_on=train_on, columns=columns)
    (documents,) = rendered([parts], tokenizer)
    if isinstance(documents, DataError):
        raise documents
    return documents


def to_parts(
    row: Row,
    tokenizer: Tokenizer,
    *,
    format: str,
    train_on: str,
    columns: Mapping[str, str | None],
) -> list[Part]:
    """What becomes the documents of the row once it is `rendered`.

    Raises:
        DataError: as `to_documents` does, but for what the chat template refuses.
    """
    check_row(row)
    if format == "text":
        text = text_column(row, column_name(columns, "text"), empty_allowed=False)
        return [Document(text, None, add_special_tokens=True, append_eos=True)]
    if format == "preference":
        conversations, train_on = [*to_pair(row, columns=columns)], "completion"
        is_text = _is_text(row, columns)
    else:
        conversations = [to_messages(row, format=format, columns=columns)]
        is_text = format == "instruct"
    if is_text and tokenizer.chat_template is None:
        return [_plain_document(messages, train_on) for messages in conversations]
    if tokenizer.chat_template is None:
        tokenizer.render_each([])  # raises, and says what to do
    tools = tools_of(row)
    for messages in conversations:
        if train_on != "all" and not any(m["role"] == "assistant" for m in messages):
            raise DataError(
                "the conversation has no assistant turn, so nothing in it is trained on; remove "
                "the row or set data.train_on=all"
            )
    return [Conversation(messages, train_on, tools) for messages in conversations]


def rendered(
    rows: Sequence[Sequence[Part]], tokenizer: Tokenizer
) -> list[list[Document] | DataError]:
    """The documents of each row, or why the chat template refuses it; all by one request.

    Nothing follows an `UnsafeError`.
    """
    asked = [part for parts in rows for part in parts if isinstance(part, Conversation)]
    chats = iter(tokenizer.render_each(asked) if asked else [])
    found: list[list[Document] | DataError] = []
    for parts in rows:
        taken = [next(chats, None) if isinstance(part, Conversation) else None for part in parts]
        try:
            pairs = zip(parts, taken, strict=True)
            found.append([_document(part, chat, tokenizer) for part, chat in pairs])
        except UnsafeError as error:
            return [*found, error]
        except DataError as error:
            found.append(error)
    return found


def _document(part: Part, chat: RenderedChat | DataError | None, tokenizer: Tokenizer) -> Document:
    if isinstance(part, Document):
        return part
    assert chat is not None
    if isinstance(chat, DataError):
        raise chat
    if part.train_on == "all":
        closed = part.messages[-1]["role"] != "assistant"
        closed = closed or chat.text.rstrip().endswith(tokenizer.stop_strings)
        return Document(chat.text, None, add_special_tokens=False, append_eos=not closed)
    if not chat.spans:
        raise DataError(
            "the chat template marks no text with {% generation %}, so nothing is trained on; "
            "mark the assistant's text in the template, or remove the tags from it"
        )
    return Document(chat.text, chat.spans, add_special_tokens=False, append_eos=chat.needs_eos)


def _plain_document(messages: list[dict[str, Any]], train_on: str) -> Document:
    """A line per message before the last one."""
    prompt = _plain_prompt(messages[:-1])
    text = prompt + messages[-1]["content"]
    spans = None if train_on == "all" else [(len(prompt), len(text))]
    return Document(text, spans, add_special_tokens=True, append_eos=True)


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
