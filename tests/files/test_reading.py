"""What somebody else may have written, at every door: an error with the file's name, in no time."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qlora_builders.checkpoint import read_adapter, read_arch
from qlora_builders.checkpoint.base_record import read_base_record
from qlora_builders.checkpoint.tensor_files import find_tensors, read_header
from qlora_builders.data import load_rows
from qlora_builders.data.prompts import read_prompts
from qlora_builders.errors import QLoRAError
from qlora_builders.files.reading import open_plain, parse_json
from qlora_builders.report import read_run
from qlora_builders.report.page import report_page
from qlora_builders.sweep import figures_of, read_seconds

SECONDS = 60
# name of a file -> what reads it
Door = Callable[[Path], object]
DOORS: dict[str, Door] = {
    "config.json": lambda file: read_arch(file.parent, format="hf"),
    "params.json": lambda file: read_arch(file.parent, format="meta"),
    "adapter_config.json": lambda file: read_adapter(file.parent),
    "qlora_base.json": lambda file: read_base_record(file.parent),
    "model.safetensors.index.json": lambda file: find_tensors(file.parent),
    "model.safetensors": read_header,
    "sweep.json": lambda file: read_seconds(file.parent),
    "rows.json": load_rows,
    "rows.jsonl": lambda file: load_rows(file)[0],
    "prompts.json": lambda file: read_prompts(file, None),  # type: ignore[arg-type]
    "prompts.jsonl": lambda file: read_prompts(file, None),  # type: ignore[arg-type]
}
CONTENTS: dict[str, bytes] = {
    "lists": b"[" * 100_000,
    "objects": b'{"a":' * 100_000,
    "closed": b"[" * 100_000 + b"]" * 100_000,
    "deeper than the limit": b'{"a":' + b"[" * 200 + b"]" * 200 + b"}",
    "digits": b'{"a": ' + b"1" * 5000 + b"}",
    "negative digits": b'{"a": -' + b"9" * 50_000 + b"}",
    "exponent": b'{"a": 1e400}',
    "negative exponent of a sign": b'{"a": -1e999}',
    "NaN": b'{"a": NaN}',
    "infinity": b'{"a": [-Infinity]}',
    "twice": b'{"a": 1, "a": 2}',
    "twice below": b'{"b": {"a": 1, "\\u0061": 2}}',
    "NUL in a string": b'{"a": "b\x00c"}',
    "NUL before": b'\x00{"a": 1}',
    "tab in a string": b'{"a": "b\tc"}',
    "two marks": b"\xef\xbb\xbf" * 2 + b'{"a": 1}',
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "utf-16 without a mark": '{"a": 1}'.encode("utf-16-le"),
    "utf-32": '{"a": 1}'.encode("utf-32"),
    "latin-1": '{"a": "é"}'.encode("latin-1"),
    "surrogates in UTF-8": b'{"a": "\xed\xa0\x80"}',
    "cut": b'{"a": "b',
    "comment": b'{"a": 1} // b',
    "single quotes": b"{'a': 1}",
    "trailing comma": b'{"a": 1,}',
    "two values": b'{"a": 1} {"a": 2}',
    "gzip": b"\x1f\x8b\x08\x00\x00\x00",
    "a page": b"<html>404</html>",
}


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    def timed_out(*_: object) -> None:
        raise TimeoutError(f"reading takes longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, timed_out)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refused(read: Door, file: Path) -> str:
    with pytest.raises(QLoRAError) as caught:
        read(file)
    text = str(caught.value)
    assert file.name in text, text
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", DOORS)
@pytest.mark.parametrize("content", CONTENTS)
def test_no_json(tmp_path: Path, name: str, content: str) -> None:
    data, file = CONTENTS[content], tmp_path / name
    framed = len(data).to_bytes(8, "little") + data
    file.write_bytes(framed if name.endswith(".safetensors") else data)
    assert "not JSON" in (text := refused(DOORS[name], file)) or "not UTF-8" in text


def put_fifo(file: Path) -> None:
    os.mkfifo(file)


# what stands in the place of a file, and what is said of it
PLACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "folder": (Path.mkdir, "folder|directory"),
    "pipe": (put_fifo, "is a pipe or device; a plain file is needed"),
    "zeros": (lambda file: file.symlink_to("/dev/zero"), "is a pipe or device; a plain file is n"),
    "nothing": (lambda file: file.symlink_to("/dev/null"), "is a pipe or device; a plain file is"),
    "empty": (Path.touch, "not JSON|there are no rows|holds no prompt|cannot hold a header"),
}


@pytest.mark.parametrize("name", [name for name in DOORS if name != "rows.jsonl"])
@pytest.mark.parametrize("place", PLACES)
def test_no_plain_file(tmp_path: Path, name: str, place: str) -> None:
    put, message = PLACES[place]
    put(tmp_path / name)
    text = refused(DOORS[name], tmp_path / name)
    assert any(part in text for part in message.split("|")), text


@pytest.mark.parametrize("name", ["prompts.txt", "prompts", "rows.jsonl", "rows.json"])
@pytest.mark.parametrize("place", ["pipe", "zeros", "folder"])
def test_no_plain_file_of_text(tmp_path: Path, name: str, place: str) -> None:
    put, message = PLACES[place]
    put(tmp_path / name)
    read = load_rows if name.startswith("rows") else lambda file: read_prompts(file, None)
    text = refused(read, tmp_path / name)
    assert any(part in text for part in message.split("|")), text


def test_open_plain(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "gone").symlink_to("b")
    (tmp_path / "circle").symlink_to("circle")
    with open_plain(tmp_path / "link") as file:
        assert file.read() == b"content"
    for name, reason in {
        "gone": "cannot be read: No such file or directory",
        "circle": "cannot be read: Too many levels of symbolic links",
        ".": "is a folder; a plain file is needed",
        "a" * 300: "cannot be read: File name too long",
    }.items():
        with pytest.raises(ValueError, match=reason):
            open_plain(tmp_path / name)


def test_the_deepest_json_that_is_read() -> None:
    depth = 200
    value = parse_json(b"[" * depth + b"]" * depth)
    for _ in range(depth - 1):
        (value,) = value
    assert value == []
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(b'{"a":' * depth + b"[]" + b"}" * depth)
    assert len(parse_json(b"[" + b",".join([b"[[]]"] * 100_000) + b"]")) == 100_000


@pytest.mark.parametrize(
    "jobs",
    [
        3, None, "a", [3], ["a"], [{}], [{"nam": "a"}],
        [{"name": 1, "swept": {}, "path": "a", "command": []}],
        [{"name": "a", "swept": {}, "path": "a", "command": [], "seconds": "1"}],
        [{"name": "a", "swept": {}, "path": "a", "command": [], "seconds": None}],
    ],
)  # fmt: skip
def test_no_sweep(tmp_path: Path, jobs: object) -> None:
    file = tmp_path / "sweep.json"
    file.write_text(json.dumps({"jobs": jobs}))
    assert "cannot be read" in refused(DOORS[file.name], file)


@pytest.mark.parametrize(
    "content",
    ["3", "[]", "{}", '{"loss": "a"}', '{"loss": 1' + "0" * 400 + "}", '{"comparison": [3]}',
     '{"comparison": [], "written": "a"}', '{"comparison": [{"plan": "a"}], "written": []}'],
)  # fmt: skip
@pytest.mark.parametrize("verb", ["evaluate", "plan"])
def test_no_figures(tmp_path: Path, verb: str, content: str) -> None:
    (tmp_path / "job.json").write_text(content)
    assert figures_of(verb, tmp_path / "job.yaml") == {}


@pytest.mark.parametrize("name", ["metrics.jsonl", "environment.jsonl", "samples.jsonl"])
@pytest.mark.parametrize("content", CONTENTS)
def test_a_page_of_a_run_with_such_a_file(tmp_path: Path, name: str, content: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (run / name).write_bytes(b'{"step": 1, "loss": 3.0}\n' + CONTENTS[content])
    assert "<html" in report_page([read_run(run)])
    assert read_run(run).metrics["loss"] == ([1], [3.0 if name == "metrics.jsonl" else 2.0])
