"""Every kind of source gives dicts, and every broken one an error with file and line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora_builders.data import load_rows
from qlora_builders.data.files import describe_row
from qlora_builders.errors import DataError

ROWS = [{"text": "a"}, {"text": "é😀"}, {"text": "c"}]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_json_lines(tmp_path: Path) -> None:
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    for content in (text, text + "\n", "\ufeff" + text, text.replace("\n", "\r\n\r\n")):
        rows = load_rows(write(tmp_path / "rows.jsonl", content))
        assert len(rows) == 3
        assert list(rows) == rows[:] == ROWS
        assert (rows[1], rows[-1]) == (ROWS[1], ROWS[2])
        with pytest.raises(IndexError):
            rows[3]


def test_json_lines_parse_when_read_and_name_the_line(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", b'{"a": 1}\n\n{"a": \n{"a": 1, "a": 2}\n{"a": "\xff"}')
    rows = load_rows(file)
    assert rows[0] == {"a": 1}
    with pytest.raises(DataError, match=r"rows\.jsonl, line 3: not JSON: Expecting value, column"):
        rows[1]
    with pytest.raises(DataError, match=r"rows\.jsonl, line 4: not JSON: key 'a' appears twice"):
        rows[2]
    with pytest.raises(DataError, match=r"rows\.jsonl, line 5: not UTF-8 text: .* at byte 7"):
        rows[3]
    unread = iter(rows)
    assert next(unread) == {"a": 1}
    for _ in range(3):  # an error does not end it
        with pytest.raises(DataError):
            next(unread)
    assert next(unread, None) is None
    assert describe_row(rows, "rows.jsonl", 1) == "rows.jsonl, line 3"
    assert describe_row([{}, {}], "x.json", 1) == "x.json, row 2 of 2"


@pytest.mark.parametrize("text", ['[{"a": 1}]', '[\n{"a": 1}\n]'])
def test_a_list_in_a_file_of_lines(text: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    with pytest.raises(
        DataError, match=r"line 1: .*; a file that is one list has to be named \.js"
    ):
        load_rows(file)[0]
    file.write_text('{"a": 1}\n[2]')
    assert load_rows(file)[1] == [2]  # for `check_row`


def test_empty_json_lines(tmp_path: Path) -> None:
    assert len(load_rows(write(tmp_path / "rows.jsonl", ""))) == 0


def test_json(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    assert load_rows(write(file, json.dumps(ROWS))) == ROWS
    assert load_rows(str(write(file, json.dumps({"data": ROWS})))) == ROWS


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("[\n{]", r"rows\.json: not JSON: Expecting property name .*, line 2, column 2"),
        ('[{"a": 1, "a": 2}]', r"rows\.json: not JSON: key 'a' appears twice"),
        ('{"a": 1}\n{"a": 2}', r"line 2, .*one object per line has to be named \.jsonl"),
        ('{"rows": []}', r"rows\.json: holds a dict; a list of objects is needed"),
        (b'["\xff"]', r"rows\.json: not UTF-8 text"),
    ],
)
def test_broken_json(content: str | bytes, match: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=match):
        load_rows(write(tmp_path / "rows.json", content))


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = tmp_path / "rows.parquet"
    datasets.Dataset.from_list(ROWS).to_parquet(str(file))
    rows = load_rows(file)
    assert (len(rows), rows[1], list(rows)) == (3, ROWS[1], ROWS)
    with pytest.raises(DataError, match=r"broken\.parquet: not a Parquet file"):
        load_rows(write(tmp_path / "broken.parquet", "no"))
    damaged = file.read_bytes().replace("é😀".encode(), b"\xff" * 6)
    with pytest.raises(DataError, match=r"broken\.parquet: .*[Ii]nvalid UTF8"):
        load_rows(write(tmp_path / "broken.parquet", damaged))


def test_parquet_without_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"'datasets': pip install 'qlora-builders\[data\]'"):
        load_rows(write(tmp_path / "rows.parquet", ""))


class FakeHub:
    """Stands in for the `datasets` module, since no test may use the network."""

    def load_dataset(self, name: str, configuration: str | None, *, split: str) -> list[Any]:
        if split == "none":
            raise RuntimeError("Unknown split")
        return [{"text": f"{name} {configuration} {split}"}]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("openai/gsm8k", "openai/gsm8k None train"),
        ("openai/gsm8k:test", "openai/gsm8k None test"),
        ("openai/gsm8k:main:test", "openai/gsm8k main test"),
    ],
)
def test_hub_ids(source: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", FakeHub())  # type: ignore[arg-type]
    assert load_rows(source) == [{"text": text}]


def test_hub_split_and_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", FakeHub())  # type: ignore[arg-type]
    assert load_rows("a/b", split="test") == [{"text": "a/b None test"}]
    with pytest.raises(DataError, match=r"cannot load 'a/b' .* split 'none'\) .*Unknown split"):
        load_rows("a/b:none")


def test_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "train.jsonl", "")
    with pytest.raises(DataError, match=r"no such file: trian\.jsonl; did you mean 'train\.jsonl'"):
        load_rows("trian.jsonl")
    with pytest.raises(DataError, match=r"did you mean '.*train\.jsonl'"):
        load_rows(tmp_path / "trains.jsonl")
    with pytest.raises(DataError, match=r"holds no file with a name like it"):
        load_rows("./else.json")
    with pytest.raises(DataError, match=r"the directory data does not exist either"):
        load_rows("data/train.jsonl")
    with pytest.raises(DataError, match=r"no such file: gsm8k; .*\(a hub id is written owner/name"):
        load_rows("gsm8k")
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match=r"no such file: data/train"):  # a folder here, not a hub id
        load_rows("data/train")
    with pytest.raises(DataError, match=r"is a directory; name one file in it: train\.jsonl$"):
        load_rows(tmp_path)
    with pytest.raises(DataError, match=r"data is a directory; .*: none fits"):
        load_rows("data")


def test_unknown_suffix(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"end in '\.csv'; allowed: \.json, \.jsonl, \.parquet"):
        load_rows(write(tmp_path / "rows.csv", ""))
