"""What `generate` is to answer: lines of text, or rows like those of the training data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlora_builders.data.files import ROW_SUFFIXES, Row, describe_row, load_rows
from qlora_builders.data.formats import Prompt, encode_prompt
from qlora_builders.data.messages import (
    DEFAULT_COLUMNS,
    asked_columns,
    check_row,
    is_conversation,
    other_columns,
    to_prompt,
    tools_of,
)
from qlora_builders.data.tokenizer import Tokenizer, check_text
from qlora_builders.errors import DataError, expand_home
from qlora_builders.files.reading import read_plain

TEXT_SUFFIXES = ("", ".txt")


def read_prompts(
    path: str | Path,
    tokenizer: Tokenizer,
    *,
    chat: bool = True,
    system: str | None = None,
    columns: Mapping[str, str | None] = DEFAULT_COLUMNS,
) -> list[Prompt]:
    """The prompts of a file: rows as `load_rows` reads them, or text with one prompt per line.

    The other arguments are those of `row_to_prompt`.

    Raises:
        DataError: naming file and line, for what cannot be read or asked.
    """
    path = expand_home(path, DataError)
    prompts = []
    for where, row, names in _read(path, columns):
        try:
            prompt = row_to_prompt(row, tokenizer, chat=chat, system=system, columns=names)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        prompts.append(replace(prompt, where=f"{where}: "))
    if not prompts:
        raise DataError(f"{path}: holds no prompt; write at least one")
    return prompts


def row_to_prompt(
    row: Row,
    tokenizer: Tokenizer,
    *,
    chat: bool = True,
    system: str | None = None,
    columns: Mapping[str, str | None] = DEFAULT_COLUMNS,
) -> Prompt:
    """A row with `messages`, `conversations` or the column of prompts.

    Args:
        chat: ask as rows are trained (`encode_prompt`); else the prompt is text to go on with.
        system: message at the beginning of what has none.
        columns: names of `prompt`, `completion` and `system`.

    Raises:
        DataError: if the row is broken, or messages cannot be put into a chat template.
    """
    check_row(row)
    messages, reference = to_prompt(row, columns=columns)
    check_text(reference or "")
    plain, conversation = tokenizer.chat_template is None, is_conversation(row)
    _check_messages(messages, conversation, chat=chat, plain=plain)
    if system and chat and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    if chat:
        tools = None if plain else tools_of(row)
        ids = encode_prompt(messages, tokenizer, plain=plain, tools=tools)
    else:
        ids = tokenizer.encode_prefix(messages[-1]["content"])
    asked = asked_columns(messages, conversation=conversation)
    return Prompt(ids, asked, reference, others=other_columns(row, columns))


def _check_messages(
    messages: Sequence[Mapping[str, Any]], conversation: bool, *, chat: bool, plain: bool
) -> None:
    if not chat and (conversation or len(messages) > 1):
        held = "messages" if conversation else "a system message"
        raise DataError(f"holds {held}, and chat=false goes on with text; leave out chat=false")
    if conversation and plain:
        raise DataError(
            "holds messages, and the tokenizer has no chat template to put them in: put a "
            "chat_template.jinja beside its tokenizer.json, or write the row with a prompt"
        )


def _read(
    path: Path, columns: Mapping[str, str | None]
) -> Iterator[tuple[str, Row, Mapping[str, str | None]]]:
    """Where each row is, the row, and the names of its columns; of text a row per line."""
    suffix = path.suffix.lower()
    if path.is_file() and suffix not in (*ROW_SUFFIXES, *TEXT_SUFFIXES):
        raise DataError(
            f"{path}: cannot read files that end in {suffix!r}; allowed: {', '.join(ROW_SUFFIXES)} "
            "with rows, and .txt or nothing with a prompt per line"
        )
    if suffix in TEXT_SUFFIXES:
        for number, line in enumerate(_read_text(path).split("\n"), start=1):
            if line.strip():
                yield f"{path}, line {number}", {"prompt": line}, DEFAULT_COLUMNS
        return
    if not path.exists():
        raise DataError(_missing(path))
    rows = load_rows(path)
    for number, row in enumerate(rows):
        yield describe_row(rows, path, number), row, columns


def _read_text(path: Path) -> str:
    try:
        text = read_plain(path).decode("utf-8-sig")
        return text.replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error.reason} at {error.start}") from error
    except ValueError as error:
        raise DataError(f"{path}: {error}" if path.exists() else _missing(path)) from error


def _missing(path: Path) -> str:
    return f"prompts_file={path}: no such file; name one with prompts"
