"""Labels line up with ids, EOS is trained, and what is cut or dropped is counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qlora_builders.data import Prompt, Tokenizer, build_dataset, check_token_range
from qlora_builders.errors import DataError

Make = Callable[..., Tokenizer]
Rows = Callable[..., Path]

SHORT = {"prompt": "2+2?", "completion": "4"}
LONG = {"prompt": "word " * 40, "completion": "yes"}
HALF = {"prompt": "a", "completion": "word " * 40}


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    def write(*content: dict[str, Any], name: str = "rows.jsonl") -> Path:
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        return file

    return write


def trained_text(tokenizer: Tokenizer, labels: torch.Tensor) -> str:
    return tokenizer.decode(labels[labels != -100].tolist(), skip_special_tokens=False)


def test_instruct_example(make_tokenizer: Make, rows: Rows) -> None:
    tokenizer = make_tokenizer()
    dataset = build_dataset(rows(SHORT), tokenizer, format="instruct", max_seq_len=64)
    example = dataset[0]
    assert example.input_ids.tolist() == [*tokenizer.encode("2+2?\n4"), tokenizer.eos_token_id]
    assert example.input_ids.dtype == example.labels.dtype == torch.int64
    assert trained_text(tokenizer, example.labels) == "4<|end_of_text|>"
    kept = example.labels != -100
    assert torch.equal(example.labels[kept], example.input_ids[kept])
    prompt = Prompt(tokenizer.encode("2+2?\n"), {"prompt": "2+2?"}, "4")
    assert dataset.prompt_and_answer(0) == prompt


def test_text_trains_all_but_the_first_token(make_tokenizer: Make, rows: Rows) -> None:
    tokenizer = make_tokenizer()
    for text in ("Hello.\n", "<|begin_of_text|>Hello.\n", "Hello.\n<|end_of_text|>"):
        example = build_dataset(rows({"text": text}), tokenizer, format="text", max_seq_len=64)[0]
        ids = [*tokenizer.encode("Hello.\n"), tokenizer.eos_token_id]
        assert example.input_ids.tolist() == ids  # neither BOS nor EOS is doubled
        assert example.labels.tolist() == [-100, *ids[1:]]


def test_an_eos_of_the_post_processor_is_not_doubled(
    write_tokenizer: Callable[..., Path], rows: Rows
) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers.processors import TemplateProcessing

    folder = write_tokenizer()
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A <|end_of_text|>",
        pair="$A $B",
        special_tokens=[("<|begin_of_text|>", 0), ("<|end_of_text|>", 1)],
    )
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.from_dir(folder)
    dataset = build_dataset(rows(SHORT), tokenizer, format="instruct", max_seq_len=64)
    assert dataset[0].input_ids.tolist() == tokenizer.encode("2+2?\n4")
    assert trained_text(tokenizer, dataset[0].labels) == "4<|end_of_text|>"
    assert dataset.prompt_and_answer(0).ids == tokenizer.encode("2+2?\n")[:-1]


def test_stock_template_trains_the_end_of_turn(
    make_tokenizer: Make, rows: Rows, templates: dict[str, str]
) -> None:
    tokenizer = make_tokenizer(templates["llama31"])
    dataset = build_dataset(rows(SHORT), tokenizer, format="instruct", max_seq_len=128)
    assert trained_text(tokenizer, dataset[0].labels) == "4<|eot_id|>"
    assert dataset[0].input_ids[0] == tokenizer.bos_token_id
    assert (dataset[0].input_ids == tokenizer.bos_token_id).sum() == 1
    prompt = dataset.prompt_and_answer(0)
    assert dataset[0].input_ids.tolist()[: len(prompt.ids)] == prompt.ids
    assert prompt.reference == "4"


def test_eos_is_added_where_the_template_ends_no_turn(make_tokenizer: Make, rows: Rows) -> None:
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    file = rows(SHORT)
    dataset = build_dataset(file, tokenizer, format="instruct", max_seq_len=64)
    assert trained_text(tokenizer, dataset[0].labels) == "assistant: 4<|end_of_text|>"
    dataset = build_dataset(file, tokenizer, format="instruct", max_seq_len=64, train_on="all")
    assert trained_text(tokenizer, dataset[0].labels).endswith("assistant: 4\n<|end_of_text|>")


def test_the_report_counts(make_tokenizer: Make, rows: Rows) -> None:
    tokenizer = make_tokenizer()
    file = rows(SHORT, LONG, HALF)
    dataset = build_dataset(file, tokenizer, format="instruct", max_seq_len=20)
    report = dataset.report
    full = [
        len(tokenizer.encode(f"{row['prompt']}\n{row['completion']}")) + 1
        for row in (SHORT, LONG, HALF)
    ]
    assert (report.rows, report.examples, len(dataset)) == (3, 2, 2)
    assert [example.row for example in dataset] == [0, 2]
    assert report.tokens == full[0] + 20
    assert report.trained_tokens == sum(int((e.labels != -100).sum()) for e in dataset)
    assert (report.truncated_rows, report.cut_tokens) == (2, full[1] + full[2] - 40)
    assert report.dropped == {"nothing trained in 20 tokens": 1}
    assert report.longest_row == max(full)
    assert report.summary().startswith(f"{file}: 2 examples, {full[0] + 20} tokens, ")
    assert report.summary().endswith("; 1 row dropped: nothing trained in 20 tokens")
    assert f"2 rows truncated, {report.cut_tokens} tokens cut" in report.summary()
    whole = build_dataset(file, tokenizer, format="instruct", max_seq_len=512).report
    assert "truncated" not in whole.summary()


def test_many_rows_keep_their_order(
    make_tokenizer: Make, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_builders.data.dataset._CHUNK", 4)
    file = rows(*({"text": "x" * (i % 7 + 1)} for i in range(30)))
    tokenizer = make_tokenizer()
    dataset = build_dataset(file, tokenizer, format="text", max_seq_len=64)
    assert [example.row for example in dataset] == list(range(30))
    for i in range(30):
        text = tokenizer.decode(dataset[i].input_ids.tolist())
        assert text == "x" * (i % 7 + 1)
    assert dataset[-1].row == 29
    with pytest.raises(IndexError):
        dataset[30]
    assert dataset.input_ids.dtype == np.int32
    first = build_dataset(file, tokenizer, format="text", max_seq_len=64, max_rows=9)
    assert (len(first), first.report.rows) == (9, 9)


def test_rows_from_a_list_file(make_tokenizer: Make, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([SHORT, 3]), encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.json, row 2 of 2: holds a int"):
        build_dataset(file, make_tokenizer(), format="instruct", max_seq_len=64)
    kept = build_dataset(file, make_tokenizer(), format="instruct", max_seq_len=64, on_error="skip")
    summary = kept.report.summary()
    assert summary.startswith(f"{file}: 1 example, ")
    assert "; 1 row skipped (data.on_error=skip): row 2 of 2: holds a int, and an obj" in summary
    file.write_text(json.dumps([SHORT, {"prompt": "x"}]), encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.json, row 2 of 2: no column"):
        build_dataset(file, make_tokenizer(), format="instruct", max_seq_len=64)


def test_errors_name_the_line(make_tokenizer: Make, rows: Rows, templates: dict[str, str]) -> None:
    tokenizer = make_tokenizer(templates["chatml"])
    good = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    file = rows({"messages": good}, {"messages": good[:1]})
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: the conversation has no assistant"):
        build_dataset(file, tokenizer, format="chat", max_seq_len=64)
    dataset = build_dataset(file, tokenizer, format="chat", max_seq_len=64, train_on="all")
    assert dataset.describe_row(1).endswith("rows.jsonl, line 2")
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: the conversation has no assistant"):
        dataset.prompt_and_answer(1)


def test_rows_that_cannot_be_used_are_skipped_and_counted(
    make_tokenizer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_builders.data.dataset._CHUNK", 2)
    good = '{"text": "Hello."}'
    lines = [good, "{", '{"text": 1}', good, '{"text": "<|end_of_text|>"}', "[]", "", good, "{}"]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(lines))
    tokenizer = make_tokenizer(with_bos=False)

    def build(on_error: str, **options: Any) -> Any:
        return build_dataset(
            file, tokenizer, format="text", max_seq_len=64, on_error=on_error, **options
        )

    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: not JSON"):
        build("raise")
    dataset = build("skip")
    alone = [i for i, line in enumerate(lines) if line == good and i < 6]
    assert [example.row for example in dataset] == [*alone, 6]  # the blank line is no row
    report = dataset.report
    assert (report.rows, report.examples, report.skipped_rows) == (8, 3, 5)
    reasons = [text.removeprefix(f"{file}, ").split(": ")[0] for text in report.skipped]
    assert sorted(reasons) == ["line 2", "line 3", "line 5", "line 6", "line 9"]
    assert "; 5 rows skipped (data.on_error=skip): line 2: not JSON" in report.summary()
    assert build("skip", max_rows=3).report.skipped_rows == 2
    file.write_text("\n".join(["{"] * 8))
    with pytest.raises(DataError, match=r"no row is left: 8 rows skipped .*line 5: .*; and 3 more"):
        build("skip")
    with pytest.raises(DataError, match=r"data\.on_error is 'skp'; did you mean 'skip'"):
        build("skp")


def test_skipping_is_for_rows_only(make_tokenizer: Make, rows: Rows) -> None:
    """A template that leaves its sandbox is no fault of the row that it does so on."""
    refuse = "{{ messages.__class__.__mro__ if messages|length > 3 else messages[0].content }}"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    file = rows({"messages": turns}, {"messages": turns * 2})
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: .*leave its sandbox"):
        build_dataset(
            file,
            make_tokenizer(refuse),
            format="chat",
            train_on="all",
            max_seq_len=64,
            on_error="skip",
        )


def test_a_row_of_one_token_trains_nothing(make_tokenizer: Make, rows: Rows) -> None:
    tokenizer = make_tokenizer(with_bos=False)
    with pytest.raises(DataError, match=r"line 1: no token is trained on; remove the row"):
        build_dataset(rows({"text": "<|end_of_text|>"}), tokenizer, format="text", max_seq_len=8)


def test_a_dataset_with_nothing_left_is_refused(make_tokenizer: Make, rows: Rows) -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(
        DataError,
        match=r"2 rows, and none has anything left to train on after truncation to "
        r"data\.max_seq_len=20: .* \(the longest row has \d+ tokens\)",
    ):
        build_dataset(rows(LONG, LONG), tokenizer, format="instruct", max_seq_len=20)
    with pytest.raises(DataError, match=r"empty\.jsonl: there are no rows"):
        build_dataset(rows(name="empty.jsonl"), tokenizer, format="text", max_seq_len=20)


def test_bad_arguments(
    make_tokenizer: Make, rows: Rows, write_tokenizer: Callable[..., Path]
) -> None:
    tokenizer, file = make_tokenizer(), rows(SHORT)
    with pytest.raises(DataError, match=r"data\.max_seq_len is 1; at least 2"):
        build_dataset(file, tokenizer, format="instruct", max_seq_len=1)
    with pytest.raises(DataError, match=r"data\.max_rows is 0; at least 1"):
        build_dataset(file, tokenizer, format="instruct", max_seq_len=9, max_rows=0)
    with pytest.raises(DataError, match=r"no chat template: .* data\.format=instruct"):
        build_dataset(file, tokenizer, format="chat", max_seq_len=9)
    folder = write_tokenizer()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match="names no EOS token, so the model could not learn to stop"):
        build_dataset(file, Tokenizer.from_dir(folder), format="instruct", max_seq_len=9)


def test_token_range(make_tokenizer: Make, rows: Rows) -> None:
    tokenizer = make_tokenizer()
    dataset = build_dataset(
        rows({"text": "Hello"}, {"text": "The quick brown fox"}),
        tokenizer,
        format="text",
        max_seq_len=64,
    )
    check_token_range(dataset, tokenizer.vocab_size)
    top = int(dataset.input_ids.max())
    with pytest.raises(
        DataError,
        match=rf"rows\.jsonl, line \d: token '.*' has id {top}, .* has {top} entries; tok",
    ):
        check_token_range(dataset, top)
    tokenizer.pad_token_id = 10_000
    with pytest.raises(
        DataError, match=r"the padding token None has id 10000, .*another pad_token"
    ):
        check_token_range(dataset, tokenizer.vocab_size)
