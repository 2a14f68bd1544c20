"""Pairs of answers: every layout gives the same two conversations, or an error that says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_builders.data import Batches, TokenizedDataset, Tokenizer, build_dataset
from qlora_builders.data.formats import Prompt, check_format, prompt_and_answer, to_documents
from qlora_builders.data.messages import to_pair
from qlora_builders.errors import DataError

Make = Callable[..., Tokenizer]
COLUMNS = check_format("preference", "assistant", None)


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


USER, GOOD, BAD = message("user", "u"), message("assistant", "yes"), message("assistant", "no")
LONG = [message("system", "s"), USER, message("assistant", "a"), message("user", "v")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "u", "chosen": "yes", "rejected": "no"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "u", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": "yes", "rejected": "no"},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "u", "chosen": [USER, GOOD], "rejected": [USER, BAD], "score_chosen": 3.5},
        {"prompt": None, "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {
            "prompt": [{"from": "human", "value": "u"}],
            "chosen": [{"from": "gpt", "value": "yes"}],
            "rejected": [{"from": "gpt", "value": "no"}],
        },
    ],
)
def test_every_layout_is_one_conversation_with_two_answers(row: dict[str, Any]) -> None:
    assert to_pair(row, columns=COLUMNS) == ([USER, GOOD], [USER, BAD])


def test_turns_before_the_last_answer_are_context(chatml: Tokenizer) -> None:
    row = {"prompt": LONG, "chosen": [GOOD], "rejected": [BAD]}
    documents = to_documents(
        row, chatml, format="preference", train_on="assistant", columns=COLUMNS
    )
    trained = [[d.text[a:b] for a, b in d.spans or []] for d in documents]
    assert trained == [["yes<|im_end|>"], ["no<|im_end|>"]]
    assert [d.text for d in documents] == [chatml.render_chat([*LONG, a]) for a in (GOOD, BAD)]
    prompt = prompt_and_answer(row, chatml, format="preference", columns=COLUMNS)
    text = chatml.render_chat(LONG, add_generation_prompt=True)
    ids = chatml.encode(text, add_special_tokens=False)
    assert prompt == Prompt(ids, {"messages": LONG}, "yes")


def test_named_columns_a_system_message_and_no_template(make_tokenizer: Make) -> None:
    plain = make_tokenizer()
    names = {"prompt": "q", "chosen": "a", "rejected": "b", "system": "sys"}
    columns = check_format("preference", "assistant", names)
    row = {"q": "u", "a": "yes", "b": "no", "sys": "s"}
    documents = to_documents(row, plain, format="preference", train_on="assistant", columns=columns)
    assert [d.text for d in documents] == ["s\nu\nyes", "s\nu\nno"]
    assert [d.text[a:b] for d in documents for a, b in d.spans or []] == ["yes", "no"]
    prompt = prompt_and_answer(row, plain, format="preference", columns=columns)
    assert prompt == Prompt(plain.encode("s\nu\n"), {"system": "s", "prompt": "u"}, "yes")
    pair = to_pair(
        {"chosen": [USER, GOOD], "rejected": [USER, BAD], "system": "s"}, columns=COLUMNS
    )
    assert pair == tuple([message("system", "s"), USER, answer] for answer in (GOOD, BAD))
    row = {"prompt": [USER], "chosen": "yes", "rejected": "no"}
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        to_documents(row, plain, format="preference", train_on="assistant", columns=COLUMNS)


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"prompt": "u", "chosen": "a"}, r"no column 'rejected' \(there are: chosen, prompt\)"),
        ({"prompt": "u", "chosen": " ", "rejected": "b"}, "column 'chosen' is empty, so nothing"),
        ({"chosen": "a", "rejected": "b"}, r"no column 'prompt' \(there are: chosen, rejected\)"),
        ({"prompt": "u", "chosen": 3, "rejected": "b"}, "column 'chosen' has to be a list of mess"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "column 'prompt' holds a int, and text is"),
        ({"prompt": [], "chosen": "a", "rejected": "b"}, "column 'prompt' has to be a list of mes"),
        (
            {"prompt": "u", "chosen": [], "rejected": "b"},
            "column 'chosen' has to be a list of mess",
        ),
        ({"chosen": [USER], "rejected": [USER, BAD]}, "column 'chosen' ends with a user message;"),
        (
            {"chosen": [USER, GOOD], "rejected": [message("user", "x"), BAD]},
            "columns 'chosen' and 'rejected' differ in message 1; they have to be one conversation",
        ),
        (
            {"chosen": [USER, GOOD], "rejected": [USER, BAD, USER, BAD]},
            "columns 'chosen' and 'rejected' differ in their number of messages; they have to",
        ),
        (
            {"chosen": [USER, message("asistant", "a")], "rejected": [USER, BAD]},
            "message 2 of 2 has the role 'asistant'; did you mean 'assistant'",
        ),
        (
            {"chosen": [message("human", "a"), GOOD], "rejected": [USER, BAD]},
            "message 1 of 2 has the role 'human'; with 'role' it is 'user'",
        ),
        (
            {"chosen": [USER, message("assistant", "")], "rejected": [USER, BAD]},
            "message 2 of 2 is an assistant turn without text",
        ),
    ],
)
def test_broken_rows_say_where(
    row: dict[str, Any], match: str, chatml: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=match):
        to_pair(row, columns=COLUMNS)
    file = tmp_path / "rows.jsonl"
    good = {"prompt": "u", "chosen": "a", "rejected": "b"}
    file.write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=rf"{file.name}.* 2: .*{match}"):
        build_dataset(file, chatml, format="preference", max_seq_len=64)


# ---- datasets and batches -----------------------------------------------------------------------


def dataset(file: Path, tokenizer: Tokenizer, *rows: Any, max_seq_len: int = 64) -> Any:
    lines = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return build_dataset(file, tokenizer, format="preference", max_seq_len=max_seq_len)


@pytest.fixture
def pairs(make_tokenizer: Make, tmp_path: Path) -> TokenizedDataset:
    rows = [(f"{i}?", f"{i} " * (i + 1), f"no {i}") for i in range(5)]
    return dataset(tmp_path / "pairs.jsonl", make_tokenizer(), *rows)


def test_answers_alternate_and_only_they_are_trained(pairs: TokenizedDataset) -> None:
    assert (len(pairs), pairs.per_row, pairs.report.examples) == (10, 2, 5)
    assert [example.row for example in pairs] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    decode = pairs.tokenizer.decode
    for index, example in enumerate(pairs):
        row = index // 2
        answer = f"no {row}" if index % 2 else f"{row} " * (row + 1)
        assert decode(example.labels[example.labels != -100].tolist()) == answer
        assert decode(example.input_ids.tolist()) == f"{row}?\n{answer}"


def test_what_is_cut_and_dropped_is_dropped_in_pairs(make_tokenizer: Make, tmp_path: Path) -> None:
    rows = [
        ("a", "yes", "no"),
        ("a", "same", "same"),
        ("a", "word " * 30 + "x", "word " * 30 + "y"),  # the same once they are cut
        ("word " * 30, "yes", "no"),
        ("a", "word " * 30, "no"),
    ]
    report = dataset(tmp_path / "a.jsonl", make_tokenizer(), *rows, max_seq_len=20).report
    assert (report.rows, report.examples, report.truncated_rows) == (5, 2, 3)
    assert report.dropped == {
        "both answers are the same": 2,
        "nothing trained in 20 tokens": 1,
    }
    assert ": 2 examples, " in report.summary()
    with pytest.raises(
        DataError, match=r"1 row, and in none the two answers differ in the first data\.max_seq_"
    ):
        dataset(tmp_path / "b.jsonl", make_tokenizer(), rows[1])


def test_batches_keep_pairs_together_for_any_number_of_ranks(pairs: TokenizedDataset) -> None:
    def batches(rank: int, num_ranks: int) -> Batches:
        return Batches(
            pairs, batch_size=2, packing="none", max_seq_len=64, rank=rank, num_ranks=num_ranks
        )

    alone = batches(0, 1)
    assert (alone.per_epoch, alone.rows_per_epoch) == (3, 5)
    seen = []
    for number in range(6):  # two epochs
        whole = alone.batch(number)
        seen += whole.rows
        assert whole.input_ids.shape[0] == 2 * len(whole.rows)
        for pair, row in enumerate(whole.rows):
            for j in range(2):
                example = pairs[2 * row + j]
                found = whole.input_ids[2 * pair + j][: len(example.input_ids)]
                assert torch.equal(found, example.input_ids)
        for num_ranks in (2, 3):
            parts = [batches(rank, num_ranks).batch(number) for rank in range(num_ranks)]
            counted = [part for part in parts if (part.labels != -100).any()]
            assert sum(len(part.labels) for part in counted) == len(whole.labels)
            assert all(len(part.labels) % 2 == 0 for part in parts)
            assert torch.equal(parts[0].input_ids[:2], whole.input_ids[:2])
    assert sorted(seen) == sorted(2 * list(range(5)))
