"""One row to its messages, whichever of the formats it is written in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_builders.data.files import Row
from qlora_builders.errors import DataError, did_you_mean, nearest

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
# what other programs call them
_OTHER_ROLES = {"developer": "system", "function": "tool", "model": "assistant", "bot": "assistant"}
_OTHER_COLUMNS = {
    "prompt": ("question", "instruction", "query", "input"),
    "completion": ("answer", "response", "output"),
}


def check_row(row: Any) -> None:
    """
    Raises:
        DataError: if a file has something else than an object for a row.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"holds a {type(row).__name__}, and an object is needed")


def to_messages(
    row: Row, *, format: str, columns: Mapping[str, str | None]
) -> list[dict[str, Any]]:
    """The row as `{"role": ..., "content": ...}` messages.

    Raises:
        DataError: for a missing column, an unknown role, content that is no text, or two system
            messages.
    """
    if format == "instruct":
        prompt = text_column(row, column_name(columns, "prompt"))
        completion = text_column(row, column_name(columns, "completion"), empty_allowed=False)
        messages = [{"role": "user", "content": prompt}]
        messages.append({"role": "assistant", "content": completion})
        return _after_system(row, columns, messages)
    name = "messages" if row.get("messages") is not None else "conversations"
    if name not in row:
        raise DataError(
            "no column 'messages' or 'conversations', one of which data.format=chat reads "
            f"(there are: {', '.join(sorted(row))})"
        )
    return _after_system(row, columns, _messages(row[name], name))


def is_conversation(row: Row) -> bool:
    """Whether it has messages, rather than a prompt."""
    return any(row.get(name) is not None for name in ("messages", "conversations"))


def to_prompt(
    row: Row, *, columns: Mapping[str, str | None]
) -> tuple[list[dict[str, Any]], str | None]:
    """The messages that are to be answered, and the answer, if the row has it.

    Of a conversation that is its last message, where that is the assistant's.

    Raises:
        DataError: as `to_messages`, and if there is nothing to answer.
    """
    if not is_conversation(row):
        prompt, completion = column_name(columns, "prompt"), column_name(columns, "completion")
        if prompt not in row:
            overrides = _overrides(row, prompt)
            advice = (
                f"write {overrides}"
                if overrides
                else "name the one with prompts: data.columns.prompt=..."
            )
            raise DataError(
                f"no column {prompt!r}, 'messages' or 'conversations' (there are: "
                f"{', '.join(sorted(row))}); {advice}"
            )
        asked = {"role": "user", "content": text_column(row, prompt)}
        messages = _after_system(row, columns, [asked])
        has_answer = row.get(completion) is not None
        return messages, text_column(row, completion) if has_answer else None
    messages = to_messages(row, format="chat", columns=columns)
    reference = messages.pop()["content"] if messages[-1]["role"] == "assistant" else None
    last = messages[-1]["role"] if messages else None
    if last not in ("user", "tool"):
        raise DataError(
            "nothing to answer: the last message before the answer has to have the role user or "
            f"tool, and {'there is none' if last is None else f'it has {last!r}'}"
        )
    return messages, reference


def asked_columns(messages: Sequence[Mapping[str, Any]], *, conversation: bool) -> dict[str, Any]:
    """The columns of a row that asks `messages`; of one that is no conversation they are a prompt,
    and perhaps a system message before it."""
    if conversation:
        return {"messages": list(messages)}
    names = {"system": "system", "user": "prompt"}
    return {names[message["role"]]: message["content"] for message in messages}


def other_columns(row: Row, columns: Mapping[str, str | None]) -> Row:
    """What a row of prompts holds beside what `to_prompt` reads."""
    names = ("messages", "conversations")
    if not is_conversation(row):
        names = (column_name(columns, "prompt"), column_name(columns, "completion"))
    return {k: v for k, v in row.items() if k not in (*names, system_column(row, columns))}


def spell_asked(row: Mapping[str, Any]) -> str:
    """What the columns of `asked_columns` ask, for a reader: each message after its role, unless
    it is the only one."""
    messages = row.get("messages")
    if not isinstance(messages, list):
        found = [("system", row.get("system")), ("user", row.get("prompt"))]
        messages = [{"role": role, "content": text} for role, text in found if text]
    said = [
        (message.get("role"), message.get("content") or message.get("tool_calls") or "")
        for message in messages
        if isinstance(message, Mapping)
    ]
    if len(said) == 1:
        return str(said[0][1])
    return "\n".join(f"{role}: {content}" for role, content in said)


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
    names = [column_name(columns, key) for key in ("chosen", "rejected")]
    if not any(name in row for name in names):
        raise DataError(
            f"no columns {names[0]!r} and {names[1]!r} (there are: {', '.join(sorted(row))}); dpo "
            "takes pairs of answers, rows with prompt, chosen and rejected"
        )
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
        where = f"in message {first + 1}" if first is not None else "in their number of messages"
        raise DataError(
            f"columns {names[0]!r} and {names[1]!r} differ {where}; they have to be one "
            "conversation with two different last answers"
        )
    return chosen, rejected


def _with_prompt(row: Row, name: str, columns: Mapping[str, str | None]) -> list[dict[str, Any]]:
    return _after_system(row, columns, _prompt_and(row, name, columns))


def _prompt_and(row: Row, name: str, columns: Mapping[str, str | None]) -> list[dict[str, Any]]:
    if isinstance(_value(row, name), str):
        content = text_column(row, name, empty_allowed=False)
        answer = [{"role": "assistant", "content": content}]
    else:
        answer = _messages(row[name], name)
    is_whole = answer[0]["role"] != "assistant"
    column = column_name(columns, "prompt")
    if is_whole and not _is_list(row.get(column)):
        return answer
    if _is_list(_value(row, column)):
        prompt = _messages(row[column], column)
        return answer if answer[: len(prompt)] == prompt else prompt + answer
    return [{"role": "user", "content": text_column(row, column)}, *answer]


def system_column(row: Row, columns: Mapping[str, str | None]) -> str | None:
    """The name of the column with the row's system message: the one named, which has to be there,
    or else `system`, if there is one."""
    return columns["system"] or ("system" if "system" in row else None)


def _after_system(
    row: Row, columns: Mapping[str, str | None], messages: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """With the message of the system column before them; none for an empty cell.

    Raises:
        DataError: if they begin with another system message.
    """
    column = system_column(row, columns)
    if column is None or not _value(row, column):
        return messages
    content = text_column(row, column)
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": content}, *messages]
    if messages[0]["content"] != content:
        raise DataError(
            f"column {column!r} and message 1 are two different system messages; remove one"
        )
    return messages


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _messages(value: Any, column: str) -> list[dict[str, Any]]:
    if not _is_list(value) or not value:
        raise DataError(f"column {column!r} has to be a list of messages that is not empty")
    return [
        _message(message, f"message {number} of {len(value)}")
        for number, message in enumerate(value, start=1)
    ]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise DataError(f"{where} is a {type(message).__name__}, and an object is needed")
    if message.get("role") is not None:
        role_key, content_key, roles = "role", "content", _OPENAI_ROLES
    elif message.get("from") is not None:
        role_key, content_key, roles = "from", "value", _SHAREGPT_ROLES
    else:
        raise DataError(
            f"{where} has neither role/content nor from/value; "
            f"its keys: {', '.join(sorted(message)) or 'none'}"
        )
    name = str(message[role_key])
    role = roles.get(name)
    if role is None:
        other = (_SHAREGPT_ROLES | _OTHER_ROLES).get(name)
        hint = f"; with {role_key!r} it is {other!r}" if other else did_you_mean(name, roles)
        raise DataError(f"{where} has the role {message[role_key]!r}{hint}")
    others = {k: v for k, v in message.items() if k not in (role_key, content_key)}
    content = _content(message.get(content_key), where)
    if content is None and not message.get("tool_calls"):
        raise DataError(f"{where} ({name}) has no {content_key!r}")
    if role == "assistant" and not (content or "").strip() and not message.get("tool_calls"):
        raise DataError(
            f"{where} is an assistant turn without text; there is nothing to learn from "
            "it: remove the row or fill it in"
        )
    return {"role": role, "content": content, **others}


def _content(value: Any, where: str) -> str | None:
    """Text, from a string or from a list of text parts."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Sequence) and all(
        isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in value
    ):
        return "".join(part["text"] for part in value)
    raise DataError(f"{where} holds something other than text, which is not supported")


def tools_of(row: Row) -> list[Mapping[str, Any]] | None:
    tools = row.get("tools")
    if tools is None or (isinstance(tools, Sequence) and not tools):
        return None
    if isinstance(tools, Sequence) and all(isinstance(tool, Mapping) for tool in tools):
        return list(tools)
    raise DataError("column 'tools' has to be a list of objects (JSON schemas)")


def column_name(columns: Mapping[str, str | None], key: str) -> str:
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
        overrides, match = _overrides(row, column), nearest(column, row)
        fitting = next((f for name, f in _FORMAT_OF_COLUMN.items() if name in row), None)
        hint = ""
        if overrides:
            hint = f"; write {overrides}"
        elif match is not None:
            hint = f"; did you mean {match!r}?"
        elif fitting is not None:
            hint = f"; rows like this one are read with data={fitting}"
        raise DataError(f"no column {column!r} (there are: {', '.join(sorted(row))}){hint}")
    return row[column]


def _overrides(row: Row, missing: str) -> str:
    """What names the columns of a row that calls them as many data sets do; empty if none is
    known for the `missing` one."""
    others = {
        key: next((name for name in names if name in row), None)
        for key, names in _OTHER_COLUMNS.items()
        if key not in row
    }
    if others.get(missing) is None:
        return ""
    words = " ".join(f"data.columns.{key}={name}" for key, name in others.items() if name)
    unread = "input" in row and others.get("prompt") not in (None, "input")
    return f"{words} (which leaves out 'input': put it into the prompt)" if unread else words


def text_column(row: Row, column: str, *, empty_allowed: bool = True) -> str:
    value = _value(row, column)
    if not isinstance(value, str):
        raise DataError(f"column {column!r} holds a {type(value).__name__}, and text is needed")
    if not empty_allowed and not value.strip():
        raise DataError(f"column {column!r} is empty, so nothing in the row is trained on")
    return value
