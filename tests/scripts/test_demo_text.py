"""The demo's text generator: deterministic, and honest about what is held back."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "demo_text.py"


@pytest.fixture(scope="module")
def demo_text() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_text", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up by name
    sys.modules["demo_text"] = module
    spec.loader.exec_module(module)
    return module


def digest(rows: list[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()[:16]


def test_output_is_pinned(demo_text: ModuleType) -> None:
    """A change here means that the shipped demo has to be made again."""
    assert digest(demo_text.base_rows(500)) == "a396e9857b9daecf"
    assert digest(demo_text.record_rows(500, held_back=False)) == "5936398136547231"
    assert digest(demo_text.record_rows(200, held_back=True)) == "692d33c87e48486d"


def test_seed_changes_the_output(demo_text: ModuleType) -> None:
    assert demo_text.base_rows(5, seed=1) != demo_text.base_rows(5, seed=2)
    train = [demo_text.record_rows(5, held_back=False, seed=seed) for seed in (1, 2)]
    assert train[0] != train[1]


def test_rows_have_the_columns_of_the_instruct_and_text_formats(demo_text: ModuleType) -> None:
    assert all(set(row) == {"text"} for row in demo_text.base_rows(50))
    rows = demo_text.record_rows(50, held_back=True)
    assert all(set(row) == {"prompt", "completion"} for row in rows)
    assert all(row["prompt"] and row["completion"] for row in rows)


def customers_and_goods(rows: list[dict[str, str]]) -> tuple[set[str], set[tuple[str, str]]]:
    records = [
        dict(line.removeprefix("- ").split(": ") for line in row["completion"].splitlines())
        for row in rows
    ]
    return (
        {record["customer"] for record in records},
        {(record["color"], record["item"]) for record in records},
    )


def test_nothing_of_eval_is_in_train(demo_text: ModuleType) -> None:
    train = demo_text.record_rows(1500, held_back=False)
    held_back = demo_text.record_rows(200, held_back=True)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_back}
    train_customers, train_goods = customers_and_goods(train)
    customers, goods = customers_and_goods(held_back)
    assert not train_customers & customers
    assert not train_goods & goods
    base = "\n".join(row["text"] for row in demo_text.base_rows(2000))
    assert not [customer for customer in customers if customer in base]
    assert not [pair for pair in goods if " ".join(pair) in base]


def test_every_prompt_holds_what_its_record_says(demo_text: ModuleType) -> None:
    for row in demo_text.record_rows(200, held_back=False):
        record = dict(line[2:].split(": ") for line in row["completion"].splitlines())
        assert list(record) == [field for field, _ in demo_text.FIELDS]
        for field in ("customer", "city", "color", "day"):
            assert record[field] in row["prompt"]
        assert demo_text.NUMBERS[int(record["quantity"]) - 2] in row["prompt"]


def test_base_has_no_records(demo_text: ModuleType) -> None:
    assert not [row for row in demo_text.base_rows(2000) if "\n- " in row["text"]]


def test_base_trains_every_special_token_that_the_recipe_does_not_add(
    demo_text: ModuleType,
) -> None:
    base = "".join(row["text"] for row in demo_text.base_rows(200))
    added = {demo_text.BOS, demo_text.EOS, demo_text.PAD}
    assert all(token in base for token in demo_text.SPECIAL_TOKENS if token not in added)


def test_turns_are_written_as_the_chat_template_writes_them(demo_text: ModuleType) -> None:
    template = jinja2.Environment().from_string(demo_text.CHAT_TEMPLATE)
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Where to?"},
        {"role": "assistant", "content": "To Porto."},
    ]
    expected = "".join(demo_text.turn(**message) for message in messages)
    rendered = template.render(messages=messages, bos_token=demo_text.BOS)
    assert rendered == demo_text.BOS + expected
    prompt = template.render(
        messages=messages[:2], bos_token=demo_text.BOS, add_generation_prompt=True
    )
    assert rendered.startswith(prompt)
    assert rendered.removeprefix(prompt) == "To Porto." + demo_text.EOT
