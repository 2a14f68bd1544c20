"""Rows become the right text with the right part trained, or an error that says what to change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from qlora_builders.data import Tokenizer
from qlora_builders.data.formats import (
    Document,
    Prompt,
    check_format,
    encode_prompt,
    prompt_and_answer,
    to_documents,
)
from qlora_builders.data.messages import to_messages
from qlora_builders.errors import DataError

Make = Callable[..., Tokenizer]
COLUMNS = check_format("chat", "all", None)


def to_document(row: dict[str, Any], tokenizer: Tokenizer, **options: Any) -> Document:
    (document,) = to_documents(row, tokenizer, **options)
    return document


def trained(row: dict[str, Any], tokenizer: Tokenizer, **options: Any) -> list[str]:
    options = {"train_on": "assistant", "columns": COLUMNS, **options}
    document = to_document(row, tokenizer, **options)
    if document.spans is None:
        return [document.text]
    return [document.text[start:end] for start, end in document.spans]


def test_text(plain: Tokenizer) -> None:
    document = to_document(
        {"body": "abc"},
        plain,
        format="text",
        train_on="assistant",
        columns=check_format("text", "all", {"text": "body"}),
    )
    assert (document.text, document.spans) == ("abc", None)
    assert document.add_special_tokens
    assert document.append_eos


def test_instruct_without_template(plain: Tokenizer) -> None:
    row = {"prompt": "p", "completion": "c", "sys": "s", "none": None}
    document = to_document(row, plain, format="instruct", train_on="assistant", columns=COLUMNS)
    assert (document.text, document.spans) == ("p\nc", [(2, 3)])
    assert document.add_special_tokens
    assert document.append_eos
    assert trained(row, plain, format="instruct", train_on="all") == ["p\nc"]
    assert trained(row, plain, format="instruct", train_on="completion") == ["c"]
    for column, text in (("sys", "s\np\nc"), ("none", "p\nc")):
        columns = check_format("instruct", "all", {"system": column})
        document = to_document(row, plain, format="instruct", train_on="all", columns=columns)
        assert document.text == text


def test_instruct_with_template_is_chat(chatml: Tokenizer) -> None:
    row = {"q": "p", "a": "c", "sys": "s"}
    columns = check_format("instruct", "all", {"prompt": "q", "completion": "a", "system": "sys"})
    document = to_document(row, chatml, format="instruct", train_on="assistant", columns=columns)
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "p"},
        {"role": "assistant", "content": "c"},
    ]
    assert document.text == chatml.render_chat(messages)
    assert [document.text[a:b] for a, b in document.spans or []] == ["c<|im_end|>"]
    assert not document.add_special_tokens
    assert not document.append_eos


TURNS = [("user", "u1"), ("assistant", "a1"), ("user", "u2"), ("assistant", "a2")]
OPENAI = {"messages": [{"role": role, "content": text} for role, text in TURNS]}
SHAREGPT = {
    "conversations": [
        {"from": {"user": "human", "assistant": "gpt"}[role], "value": text} for role, text in TURNS
    ]
}


@pytest.mark.parametrize("row", [OPENAI, SHAREGPT])
def test_chat(row: dict[str, Any], chatml: Tokenizer) -> None:
    both = ["a1<|im_end|>", "a2<|im_end|>"]
    assert to_messages(row, format="chat", columns=COLUMNS) == OPENAI["messages"]
    assert trained(row, chatml, format="chat") == both
    assert trained(row, chatml, format="chat", train_on="completion") == both[1:]
    everything = [chatml.render_chat(OPENAI["messages"])]
    assert trained(row, chatml, format="chat", train_on="all") == everything


def test_a_turn_behind_the_last_answer_is_not_trained(chatml: Tokenizer) -> None:
    row = {"messages": [*OPENAI["messages"], {"role": "user", "content": "u3"}]}
    assert trained(row, chatml, format="chat", train_on="completion") == ["a2<|im_end|>"]


def test_content_parts_and_absent_columns() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    row = {
        "messages": None,  # a table with both columns has one of them empty
        "conversations": [{"role": "user", "content": parts}, OPENAI["messages"][1]],
    }
    assert to_messages(row, format="chat", columns=COLUMNS)[0]["content"] == "ab"


def test_tools_reach_the_template(make_tokenizer: Make, templates: dict[str, str]) -> None:
    tokenizer = make_tokenizer(templates["llama31"])
    row = {**OPENAI, "tools": [{"name": "adder"}]}
    for train_on in ("assistant", "all"):
        document = to_document(row, tokenizer, format="chat", train_on=train_on, columns=COLUMNS)
        assert "adder" in document.text
    prompt = prompt_and_answer(row, tokenizer, format="chat", columns=COLUMNS)
    assert "adder" in tokenizer.decode(prompt.ids)
    row["tools"] = []
    assert to_document(row, tokenizer, format="chat", train_on="all", columns=COLUMNS) == (
        to_document(OPENAI, tokenizer, format="chat", train_on="all", columns=COLUMNS)
    )
    row["tools"] = "adder"
    with pytest.raises(DataError, match="column 'tools' has to be a list of objects"):
        to_document(row, tokenizer, format="chat", train_on="all", columns=COLUMNS)


def test_prompt_and_answer(chatml: Tokenizer, plain: Tokenizer) -> None:
    prompt = prompt_and_answer(OPENAI, chatml, format="chat", columns=COLUMNS)
    text = chatml.render_chat(OPENAI["messages"][:3], add_generation_prompt=True)
    ids = chatml.encode(text, add_special_tokens=False)
    assert prompt == Prompt(ids, {"messages": OPENAI["messages"][:3]}, "a2")
    row = {"prompt": "p", "completion": " c "}
    ids = plain.encode("p\n")
    prompt = prompt_and_answer(row, plain, format="instruct", columns=COLUMNS)
    assert prompt == Prompt(ids, {"prompt": "p"}, " c ")
    prompt = prompt_and_answer(row | {"system": "s"}, plain, format="instruct", columns=COLUMNS)
    assert prompt == Prompt(plain.encode("s\np\n"), {"system": "s", "prompt": "p"}, " c ")
    assert ids == encode_prompt([USER | {"content": "p"}], plain, plain=True)
    with pytest.raises(DataError, match=r"data\.format=text has no prompts to answer"):
        prompt_and_answer(row, plain, format="text", columns=COLUMNS)
    with pytest.raises(DataError, match="no assistant turn to compare an answer with"):
        prompt_and_answer(
            {"messages": OPENAI["messages"][:1]}, chatml, format="chat", columns=COLUMNS
        )


def chat(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


USER = {"role": "user", "content": "u"}


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"b": 1, "a": 2}, r"no column 'messages' or 'conversations', .*\(there are: a, b\)"),
        ({"messages": "hi"}, "column 'messages' has to be a list of messages that is not empty"),
        ({"conversations": []}, "column 'conversations' has to be a list of messages"),
        (chat("hi"), "message 1 of 1 is a str, and an object is needed"),
        (
            chat({"text": "x"}),
            "message 1 of 1 has neither role/content nor from/value; its keys: t",
        ),
        (chat({"role": "asistant", "content": ""}), "role 'asistant'; did you mean 'assistant'"),
        (chat({"role": "gpt", "content": ""}), "the role 'gpt'; with 'role' it is 'assistant'"),
        (chat({"role": "bot", "content": ""}), "the role 'bot'; with 'role' it is 'assistant'"),
        (chat({"role": "developer", "content": ""}), "'developer'; with 'role' it is 'system'"),
        (chat({"role": "judge", "content": ""}), "'judge'; allowed: assistant, system, tool, u"),
        (chat({"from": "human"}), r"message 1 of 1 \(human\) has no 'value'"),
        (
            chat({"role": "system", "content": "one"}, USER) | {"system": "two"},
            "column 'system' and message 1 are two different system messages; remove one",
        ),
        (chat(USER) | {"system": ["s"]}, "column 'system' holds a list, and text is needed"),
        (chat({"from": "bing", "value": ""}), "role 'bing'"),
        (chat(USER, {"role": "user"}), r"message 2 of 2 \(user\) has no 'content'"),
        (chat(USER, {"role": "assistant", "content": " "}), "message 2 of 2 is an assistant turn"),
        (chat({"role": "user", "content": 3}), "message 1 of 1 holds something other"),
        (chat({"role": "user", "content": [{"type": "image"}]}), "something other than text"),
        (chat(USER), "has no assistant turn, so nothing in it is trained on"),
    ],
)
def test_broken_chats(row: dict[str, Any], match: str, chatml: Tokenizer) -> None:
    with pytest.raises(DataError, match=match):
        to_document(row, chatml, format="chat", train_on="assistant", columns=COLUMNS)


@pytest.mark.parametrize(
    ("row", "match"),
    [
        (
            {"promt": "p", "completion": "c"},
            r"no column 'prompt' \(there are: completion, promt\); did you mean 'promt'\?",
        ),
        ({"prompt": "p"}, r"no column 'completion' \(there are: prompt\)$"),
        (
            {"question": "p", "answer": "c"},
            "; write data.columns.prompt=question data.columns.completion=answer$",
        ),
        (
            {"instruction": "p", "input": "i", "output": "c"},
            r"; write data.columns.prompt=instruction data.columns.completion=output \(which "
            r"leaves out 'input': put it into the prompt\)$",
        ),
        ({"prompt": "p", "output": "c"}, "; write data.columns.completion=output$"),
        ({"prompt": "p", "completion": 3}, "column 'completion' holds a int, and text is needed"),
        ({"prompt": "p", "completion": "\n"}, "column 'completion' is empty, so nothing"),
    ],
)
def test_broken_instruct_rows(row: dict[str, Any], match: str, plain: Tokenizer) -> None:
    with pytest.raises(DataError, match=match):
        to_document(row, plain, format="instruct", train_on="assistant", columns=COLUMNS)


def test_broken_text_rows(plain: Tokenizer) -> None:
    columns = check_format("text", "all", {"text": None})
    with pytest.raises(DataError, match=r"data\.columns\.text is null; name the column"):
        to_document({}, plain, format="text", train_on="all", columns=columns)
    with pytest.raises(DataError, match="column 'text' is empty"):
        to_document({"text": ""}, plain, format="text", train_on="all", columns=COLUMNS)


def test_a_template_that_marks_nothing(make_tokenizer: Make, templates: dict[str, str]) -> None:
    source = templates["generation"].replace("message.role == 'assistant'", "message.role == 'x'")
    tokenizer = make_tokenizer(source)
    with pytest.raises(DataError, match=r"marks no text with \{% generation %\}"):
        to_document(OPENAI, tokenizer, format="chat", train_on="assistant", columns=COLUMNS)


def test_check_format() -> None:
    assert check_format("instruct", "all", {"prompt": "q"}) == {
        "prompt": "q",
        "completion": "completion",
        "system": None,
        "text": "text",
        "chosen": "chosen",
        "rejected": "rejected",
    }
    with pytest.raises(DataError, match=r"data\.format is 'instrct'; did you mean 'instruct'"):
        check_format("instrct", "all", None)
    with pytest.raises(DataError, match=r"data\.train_on is 'x'; allowed: all, assistant, comple"):
        check_format("chat", "x", None)
    with pytest.raises(DataError, match=r"data\.columns has no 'promt'; did you mean 'prompt'"):
        check_format("chat", "all", {"promt": "q"})
