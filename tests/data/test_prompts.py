"""Rows and lines become the prompts that training would have shown the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlora_builders.data import (
    Tokenizer,
    build_dataset,
    read_prompts,
    row_to_prompt,
    spell_asked,
)
from qlora_builders.data.messages import DEFAULT_COLUMNS
from qlora_builders.errors import DataError

Make = Callable[..., Tokenizer]
TURNS = [
    {"role": "user", "content": "u1"},
    {"role": "assistant", "content": "a1"},
    {"role": "user", "content": "u2"},
]
ANSWER = {"role": "assistant", "content": "a2"}
SYSTEM = {"role": "system", "content": "s"}
SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "u1"},
        {"from": "gpt", "value": "a1"},
        {"from": "human", "value": "u2"},
    ]
}


def rendered(tokenizer: Tokenizer, messages: list[dict[str, str]], **options: Any) -> list[int]:
    text = tokenizer.render_chat(messages, add_generation_prompt=True, **options)
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("row", [{"messages": TURNS}, SHAREGPT])
def test_a_conversation_without_its_answer(row: dict[str, Any], chatml: Tokenizer) -> None:
    prompt = row_to_prompt(row, chatml)
    assert prompt.ids == rendered(chatml, TURNS)
    assert prompt.asked == {"messages": TURNS}
    assert (prompt.reference, prompt.last_message) == (None, "u2")


def test_the_answer_at_the_end_is_the_reference(chatml: Tokenizer) -> None:
    row = {"messages": [*TURNS, ANSWER], "prompt": "not this one"}
    prompt = row_to_prompt(row, chatml)
    assert prompt.ids == rendered(chatml, TURNS)
    assert (prompt.asked, prompt.reference) == ({"messages": TURNS}, "a2")
    assert len(row["messages"]) == 4  # it stays as it was


def test_a_system_message_is_added_where_there_is_none(chatml: Tokenizer) -> None:
    prompt = row_to_prompt({"messages": TURNS}, chatml, system="s")
    assert prompt.ids == rendered(chatml, [SYSTEM, *TURNS])
    assert prompt.asked == {"messages": [SYSTEM, *TURNS]}
    own = row_to_prompt({"messages": [SYSTEM, *TURNS]}, chatml, system="another")
    assert own == prompt


@pytest.mark.parametrize("name", ["system", "sys"])
def test_a_conversation_after_the_system_column(name: str, chatml: Tokenizer) -> None:
    columns = {**DEFAULT_COLUMNS, "system": None if name == "system" else name}
    row = {name: "s", **SHAREGPT}
    prompt = row_to_prompt(row, chatml, system="another", columns=columns)
    assert (prompt.asked, prompt.others) == ({"messages": [SYSTEM, *TURNS]}, {})
    both = row | {"conversations": [{"from": "system", "value": "s"}, *SHAREGPT["conversations"]]}
    assert row_to_prompt(both, chatml, columns=columns) == prompt
    assert row_to_prompt(row | {name: ""}, chatml, columns=columns).asked == {"messages": TURNS}
    if name != "system":
        with pytest.raises(DataError, match="no column 'sys'"):
            row_to_prompt(SHAREGPT, chatml, columns=columns)


def test_other_columns_are_kept(chatml: Tokenizer) -> None:
    row = {"id": 7, "system": "s", "prompt": "p", "completion": "c", "tags": ["a"]}
    assert row_to_prompt(row, chatml).others == {"id": 7, "tags": ["a"]}
    row = {"messages": TURNS, "conversations": None, "prompt": "p", "tools": []}
    assert row_to_prompt(row, chatml).others == {"prompt": "p", "tools": []}


def test_tables_are_not_text(chatml: Tokenizer, tmp_path: Path) -> None:
    for name in ("rows.csv", "rows.TSV", "rows.xlsx"):
        (tmp_path / name).write_text("prompt\none\n")
        with pytest.raises(
            DataError, match=r"cannot read files that end in '\.\w+'; allowed: .json"
        ):
            read_prompts(tmp_path / name, chatml)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": "p"}, "p"),
        ({"system": "s", "prompt": "p"}, "system: s\nuser: p"),
        ({"messages": TURNS}, "user: u1\nassistant: a1\nuser: u2"),
        ({"messages": TURNS[:1]}, "u1"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [1]}]}, "[1]"),
        ({"messages": [3, None]}, ""),
    ],
)
def test_what_was_asked_as_text(row: dict[str, Any], text: str) -> None:
    assert spell_asked(row) == text


def test_tools_and_their_results(make_tokenizer: Make, templates: dict[str, str]) -> None:
    tokenizer = make_tokenizer(templates["llama31"])
    call = {"function": {"name": "adder", "arguments": {}}}
    messages = [
        TURNS[0],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3"},
    ]
    tools = [{"name": "adder"}]
    prompt = row_to_prompt({"messages": messages, "tools": tools}, tokenizer)
    assert prompt.ids == rendered(tokenizer, messages, tools=tools)  # type: ignore[arg-type]
    prompt = row_to_prompt({"messages": messages[:2], "tools": tools}, tokenizer)
    assert prompt.asked == {"messages": messages[:1]}
    assert prompt.reference is None  # a call is no text


def test_prompts_with_a_template(chatml: Tokenizer) -> None:
    prompt = row_to_prompt({"prompt": "p", "completion": "c"}, chatml, system="s")
    assert prompt.ids == rendered(chatml, [SYSTEM, {"role": "user", "content": "p"}])
    assert (prompt.asked, prompt.reference) == ({"system": "s", "prompt": "p"}, "c")
    assert row_to_prompt({"system": "s", "prompt": "p", "completion": "c"}, chatml) == prompt
    columns = {"prompt": "q", "completion": "a", "system": "sys"}
    row = {"q": "p", "a": "c", "sys": "s"}
    assert row_to_prompt(row, chatml, columns=columns) == prompt
    assert row_to_prompt(row, chatml, columns=columns, system="another") == prompt


def test_prompts_without_a_template(plain: Tokenizer) -> None:
    prompt = row_to_prompt({"prompt": "p", "completion": None, "tools": [3]}, plain)
    assert prompt.ids == plain.encode("p\n")
    assert prompt.reference is None
    assert row_to_prompt({"prompt": "p"}, plain, system="s").ids == plain.encode("s\np\n")
    assert row_to_prompt({"prompt": "p"}, plain, chat=False).ids == plain.encode("p")


@pytest.mark.parametrize("template", [None, "chatml", "llama31", "llama2"])
def test_ids_are_the_beginning_of_the_trained_row(
    template: str | None, make_tokenizer: Make, templates: dict[str, str], tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(template and templates[template])
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "2 + 2?", "completion": "4"}))
    dataset = build_dataset(rows, tokenizer, format="instruct", max_seq_len=256)
    (prompt,) = read_prompts(rows, tokenizer)
    assert dataset[0].input_ids.tolist()[: len(prompt.ids)] == prompt.ids
    assert replace(prompt, where="") == dataset.prompt_and_answer(0)


def test_files_of_every_kind(chatml: Tokenizer, tmp_path: Path) -> None:
    rows = [{"prompt": "one"}, {"messages": TURNS}]
    lines = tmp_path / "rows.JSONL"
    lines.write_text("\n".join(["", *map(json.dumps, rows)]))
    found = read_prompts(lines, chatml)
    assert [prompt.last_message for prompt in found] == ["one", "u2"]
    assert [prompt.where for prompt in found] == [f"{lines}, line 2: ", f"{lines}, line 3: "]
    listed = tmp_path / "rows.json"
    listed.write_text(json.dumps({"data": rows}))
    assert [prompt.ids for prompt in read_prompts(listed, chatml)] == [p.ids for p in found]
    text = tmp_path / "prompts"
    text.write_bytes('\ufeffone\r\n  \n{"prompt": "two\u2028"}\n'.encode())
    columns = {"prompt": "question", "completion": "answer", "system": None}
    found = read_prompts(text, chatml, columns=columns)
    assert [prompt.asked["prompt"] for prompt in found] == ["one", '{"prompt": "two\u2028"}']
    assert [prompt.where for prompt in found] == [f"{text}, line 1: ", f"{text}, line 3: "]


@pytest.mark.parametrize(
    ("row", "options", "match"),
    [
        ([1], {}, "holds a list, and an object is needed"),
        ({"q": "p"}, {}, r"no column 'prompt', 'messages' or 'conversations' \(there are: q\)"),
        ({"messages": [ANSWER]}, {}, "nothing to answer: .* and there is none$"),
        ({"messages": [*TURNS[:2], ANSWER]}, {}, "nothing to answer: .* it has 'assistant'$"),
        ({"messages": [SYSTEM]}, {}, "nothing to answer: .* it has 'system'$"),
        ({"prompt": "p", "completion": "\ud800"}, {}, "half of a surrogate pair"),
        ({"messages": TURNS}, {"chat": False}, "chat=false goes on with text; leave out chat="),
        ({"prompt": "p", "system": "s"}, {"chat": False}, "holds a system message, and chat=false"),
        ({"question": "p"}, {}, r"\(there are: question\); write data.columns.prompt=question$"),
    ],
)
def test_rows_that_cannot_be_asked(
    row: Any, options: dict[str, Any], match: str, chatml: Tokenizer
) -> None:
    with pytest.raises(DataError, match=match):
        row_to_prompt(row, chatml, **options)


def test_messages_need_a_template(plain: Tokenizer) -> None:
    with pytest.raises(DataError, match="the tokenizer has no chat template to put them in"):
        row_to_prompt({"messages": TURNS}, plain)
