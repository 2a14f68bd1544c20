"""One row to one document: text, and which of its characters are trained on.

Three formats: `text` (one column), `instruct` (a prompt and a completion column) and `chat`
(a column of messages, OpenAI's or ShareGPT's). A row of the fourth, `preference`, becomes two
documents: the same conversation with the chosen and with the rejected answer at its end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_builders.data.chat_template import Span
from qlora_builders.data.files import Row
from qlora_builders.data.tokenizer import Tokenizer, check_text
from qlora_builders.errors import DataError, did_you_mean, nearest

FORMATS = ("chat", "instruct", "text", "preference")
TRAIN_ON = ("assistant", "completion", "all")
DEFAULT_COLUMNS = {
    "prompt": "prompt",
    "completion": "completion",
    "system": None,
    "text": "text",
    "chosen": "chosen",
    "rejected": "rejected",
}

_OPENAI_ROLES = {role: role for role in ("system", "user", "assistant", "tool")}
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
}


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
    if not isinstance(row, Mapping):
        raise DataError(f"holds a {type(row).__name__}, and an object is needed")
    if format != "preference":
        return [to_document(row, tokenizer, format=format, train_on=train_on, columns=columns)]
    plain = _is_plain(row, tokenizer, columns)
    return [
        _conversation(messages, tokenizer, train_on="completion", plain=plain, tools=_tools(row))
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
        text = _text(row, _column(columns, "text"), empty_allowed=False)
        return Document(text, None, add_special_tokens=True, append_eos=True)
    messages = to_messages(row, format=format, columns=columns)
    plain = format == "instruct" and tokenizer.chat_template is None
    tools = None if plain else _tools(row)
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
) -> tuple[list[int], str]:
    """Token ids up to where the last assistant turn begins, and the text of that turn (the chosen
    one, where there are two).

    Raises:
        DataError: if the format has no answers, or the row none.
    """
    if format == "text":
        raise DataError("data.format=text has no prompts to answer; use instruct or chat")
    if format == "preference":
        messages, plain = to_pair(row, columns=columns)[0], _is_plain(row, tokenizer, columns)
    else:
        messages = to_messages(row, format=format, columns=columns)
        plain = format == "instruct" and tokenizer.chat_template is None
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise DataError("the conversation has no assistant turn to compare an answer with")
    before, answer = messages[: turns[-1]], messages[turns[-1]].get("content") or ""
    if plain:
        ids = tokenizer.encode(_plain_prompt(before), add_special_tokens=False)
        return [*tokenizer.special_tokens_around(ids)[0], *ids], answer
    text = tokenizer.render_chat(before, add_generation_prompt=True, tools=_tools(row))
    return tokenizer.encode(text, add_special_tokens=False), answer


def to_messages(
    row: Row, *, format: str, columns: Mapping[str, str | None]
) -> list[dict[str, Any]]:
    """The row as `{"role": ..., "content": ...}` messages.

    Raises:
        DataError: for a missing column, an unknown role, or content that is no text.
    """
    if format == "instruct":
        messages = _system(row, columns)
        messages.append({"role": "user", "content": _text(row, _column(columns, "prompt"))})
        completion = _text(row, _column(columns, "completion"), empty_allowed=False)
        messages.append({"role": "assistant", "content": completion})
        return messages
    name = "messages" if row.get("messages") is not None else "conversations"
    if name not in row:
        raise DataError(
            "no column 'messages' or 'conversations', one of which data.format=chat reads "
            f"(there are: {', '.join(sorted(row))})"
        )
    return _messages(row[name], name)


def to_pair(
    row: Row, *, columns: Mapping[str, str | None]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The conversation with the chosen answer at its end, and with the rejected one.

    Each column holds text or a list of messages. `chosen` and `rejected` are the answers, and
    `prompt` what comes before; or they are whole conversations, and then there may be no `prompt`,
    or one that only repeats their beginning.

    Raises:
        DataError: as `to_messages`, and if the two differ in more than the last answer.
    """
    names = [_column(columns, key) for key in ("chosen", "rejected")]
    chosen, rejected = (_with_prompt(row, name, columns) for name in names)
    for name, messages in zip(names, (chosen, rejected), strict=True):
        if messages[-1]["role"] != "assistant":
            raise DataError(
                f"column {name!r} ends with a {messages[-1]['role']} message; it has to end with "
                "the assistant's answer, which is what is compared"
            )
    if chosen[:-1] != rejected[:-1]:
        pairs = zip(chosen[:-1], rejected[:-1], strict=False)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        where = f"in message {first}" if first is not None else "in their number of messages"
        raise DataError(
            f"columns {names[0]!r} and {names[1]!r} differ {where}; they have to be one "
            "conversation with two different last answers"
        )
    return chosen, rejected


def _with_prompt(row: Row, name: str, columns: Mapping[str, str | None]) -> list[dict[str, Any]]:
    if isinstance(_value(row, name), str):
        content = _text(row, name, empty_allowed=False)
        answer = [{"role": "assistant", "content": content}]
    else:
        answer = _messages(row[name], name)
    is_whole = answer[0]["role"] != "assistant"
    column = _column(columns, "prompt")
    if is_whole and not _is_list(row.get(column)):
        return answer
    if _is_list(_value(row, column)):
        prompt = _messages(row[column], column)
        return answer if answer[: len(prompt)] == prompt else prompt + answer
    prompt = [{"role": "user", "content": _text(row, column)}]
    return _system(row, columns) + prompt + answer


def _is_plain(row: Row, tokenizer: Tokenizer, columns: Mapping[str, str | None]) -> bool:
    """Whether a preference row is text without a template to put it in."""
    names = (_column(columns, key) for key in ("prompt", "chosen", "rejected"))
    return tokenizer.chat_template is None and all(isinstance(row.get(n), str) for n in names)


def _system(row: Row, columns: Mapping[str, str | None]) -> list[dict[str, Any]]:
    """No message for an empty cell."""
    column = columns["system"]
    if column is None or not _value(row, column):
        return []
    return [{"role": "system", "content": _text(row, column)}]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _messages(value: Any, column: str) -> list[dict[str, Any]]:
    if not _is_list(value) or not value:
        raise DataError(f"column {column!r} has to be a list of messages that is not empty")
    return [_message(message, index) for index, message in enumerate(value)]


def _message(message: Any, index: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise DataError(f"message {index} is a {type(message).__name__}, and an object is needed")
    if message.get("role") is not None:
        role_key, content_key, roles = "role", "content", _OPENAI_ROLES
    elif message.get("from") is not None:
        role_key, content_key, roles = "from", "value", _SHAREGPT_ROLES
    else:
        raise DataError(
            f"message {index} has neither role/content nor from/value; "
            f"its keys: {', '.join(sorted(message)) or 'none'}"
        )
    role = roles.get(str(message[role_key]))
    if role is None:
        name = str(message[role_key])
        other = _SHAREGPT_ROLES.get(name)
        hint = f"; with {role_key!r} it is {other!r}" if other else did_you_mean(name, roles)
        raise DataError(f"message {index} has the role {message[role_key]!r}{hint}")
    others = {k: v for k, v in message.items() if k not in (role_key, content_key)}
    content = _content(message.get(content_key), index)
    if content is None and not message.get("tool_calls"):
        raise DataError(f"message {index} ({role}) has no {content_key!r}")
    if role == "assistant" and not (content or "").strip() and not message.get("tool_calls"):
        raise DataError(
            f"message {index} is an assistant turn without text; there is nothing to learn from "
            "it: remove the row or fill it in"
        )
    return {"role": role, "content": content, **others}


def _content(value: Any, index: int) -> str | None:
    """Text, from a string or from a list of text parts."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Sequence) and all(
        isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in value
    ):
        return "".join(part["text"] for part in value)
    raise DataError(f"message {index} holds something other than text, which is not supported")


def _plain_prompt(messages: Sequence[Mapping[str, Any]]) -> str:
    """What stands before the completion when there is no chat template: a line per message."""
    return "".join(f"{message['content']}\n" for message in messages)


def _tools(row: Row) -> list[Mapping[str, Any]] | None:
    tools = row.get("tools")
    if tools is None or (isinstance(tools, Sequence) and not tools):
        return None
    if isinstance(tools, Sequence) and all(isinstance(tool, Mapping) for tool in tools):
        return list(tools)
    raise DataError("column 'tools' has to be a list of objects (JSON schemas)")


def _column(columns: Mapping[str, str | None], key: str) -> str:
    name = columns[key]
    if name is None:
        raise DataError(f"data.columns.{key} is null; name the column to read")
    return name


# what a row holds -> the format that reads it
_FORMAT_OF_COLUMN = {
    "messages": "chat",
    "conversations": "chat",
    "chosen": "preference",
    "text": "text",
    "completion": "instruct",
}


def _value(row: Row, column: str) -> Any:
    if column not in row:
        match = nearest(column, row)
        hint = f"; did you mean {match!r}?" if match is not None else ""
        fitting = next((f for name, f in _FORMAT_OF_COLUMN.items() if name in row), None)
        if not hint and fitting is not None:
            hint = f"; rows like this one are read with data={fitting}"
        raise DataError(f"no column {column!r} (there are: {', '.join(sorted(row))}){hint}")
    return row[column]


def _text(row: Row, column: str, *, empty_allowed: bool = True) -> str:
    value = _value(row, column)
    if not isinstance(value, str):
        raise DataError(f"column {column!r} holds a {type(value).__name__}, and text is needed")
    if not empty_allowed and not value.strip():
        raise DataError(f"column {column!r} is empty, so nothing in the row is trained on")
    return value
