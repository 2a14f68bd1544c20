"""generate: prompts of every kind, and where its answers go."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from qlora_builders import cli, models
from qlora_builders.data import Tokenizer

F32 = "compute_dtype=float32"


def test_generate_answers_streamed_or_not(
    checkpoint: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("what comes after three\nwhat comes after five\n")
    argv = ["generate", f"checkpoint.dir={checkpoint}", f"adapter.path={adapter}", F32]
    for stream in ("true", "false"):
        assert cli.main([*argv, "prompt=what comes after one", f"stream={stream}"]) == 0
        assert capsys.readouterr().out == "two\n"
        assert cli.main([*argv, f"prompts_file={prompts}", f"stream={stream}"]) == 0
        expected = ">>> what comes after three\nfour\n>>> what comes after five\nsix\n"
        assert capsys.readouterr().out == expected
    assert cli.main([*argv, f"prompts_file={prompts}", "batch_size=2"]) == 0
    assert capsys.readouterr().out == expected


def test_sampling_depends_on_the_seed_alone(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["generate", f"checkpoint.dir={checkpoint}", F32, "prompt=what", "max_new_tokens=20"]
    outputs = []
    for seed in (0, 0, 1):
        options = ["temperature=1.0", "top_k=50", "top_p=0.9", f"seed={seed}"]
        assert cli.main([*argv, *options]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


@pytest.fixture(scope="module")
def plain_checkpoint(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without a chat template."""
    path = tmp_path_factory.mktemp("plain") / "hf"
    shutil.copytree(checkpoint, path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_without_a_template_prompts_are_those_of_training(
    plain_checkpoint: Path,
    rows: Path,
    train_adapter: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = train_adapter(plain_checkpoint, rows, tmp_path / "run")
    argv = ["generate", f"checkpoint.dir={plain_checkpoint}", f"adapter.path={adapter}", F32]
    outputs = []
    question = "prompt=what comes after two"
    for words in ([question], [f"{question}\n", "chat=false"]):
        capsys.readouterr()
        assert cli.main([*argv, *words]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs == ["three\n", "three\n"]
    assert cli.main([*argv, question, "chat=false"]) == 0
    assert capsys.readouterr().out != "three\n"  # no newline comes behind


@pytest.mark.parametrize("options", [[], ["stream=false"], ["batch_size=3"]])
def test_answers_to_rows_in_a_file(
    checkpoint: Path,
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
) -> None:
    turns = [
        {"from": "human", "value": "what comes after one"},
        {"from": "gpt", "value": "two"},
        {"from": "human", "value": "what comes after two"},
    ]
    rows = [
        {"id": 7, "question": "what comes after five", "answer": "six", "num_tokens": "?"},
        {"messages": [{"role": "user", "content": "what comes after three"}]},
        {"conversations": [*turns, {"from": "gpt", "value": "dr\u00e9i"}]},
    ]
    file, output = tmp_path / "rows.jsonl", tmp_path / "new" / "answers.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["generate", f"checkpoint.dir={checkpoint}", f"adapter.path={adapter}", F32]
    argv += [f"prompts_file={file}", f"output={output}", "max_new_tokens=9", *options]
    argv += ["data.columns.prompt=question", "data.columns.completion=answer"]
    assert cli.main(argv) == 0
    assert capsys.readouterr() == (f"wrote {output} (3 answers)\n", "")
    text = output.read_text()
    assert "dréi" in text  # as it was written
    answers = [json.loads(line) for line in text.splitlines()]
    assert [list(answer) for answer in answers] == [
        ["id", "prompt", "answer", "reference", "num_tokens", "finish_reason"],
        ["messages", "answer", "num_tokens", "finish_reason"],
        ["messages", "answer", "reference", "num_tokens", "finish_reason"],
    ]
    assert (answers[0]["prompt"], answers[0]["answer"]) == ("what comes after five", "six")
    assert (answers[0]["id"], answers[0]["reference"]) == (7, "six")
    assert answers[1]["messages"] == rows[1]["messages"]
    assert answers[1]["answer"] == "four"
    assert [m["role"] for m in answers[2]["messages"]] == ["user", "assistant", "user"]
    assert answers[0]["finish_reason"] == answers[1]["finish_reason"] == "stop"
    assert 0 < answers[0]["num_tokens"] < 9
    assert cli.main(argv) == 2
    assert f"output={output} exists; choose another name" in capsys.readouterr().err
    assert output.read_text() == text


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_what_is_answered_outlives_an_interrupt(
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
) -> None:
    prompts, output = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    prompts.write_text("one\ntwo\nthree\n")
    calls = iter((True, True, False))
    generate_batch = models.generate_batch

    def interrupt(*given: Any, **options: Any) -> Any:
        if next(calls):
            return generate_batch(*given, **options)
        raise error

    monkeypatch.setattr("qlora_builders.models.generate_batch", interrupt)
    argv = ["generate", f"checkpoint.dir={checkpoint}", F32, "max_new_tokens=2"]
    argv += [f"prompts_file={prompts}", f"output={output}"]
    assert cli.main(argv) != 0
    assert f"what was finished is in {output}.partial\n" in capsys.readouterr().err
    assert not output.exists()
    lines = (tmp_path / "answers.jsonl.partial").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["one", "two"]
    assert cli.main(argv) == 2
    assert "rename or remove it, or choose another name" in capsys.readouterr().err


def test_progress_is_for_terminals(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, shown = tmp_path / "prompts.txt", Terminal()
    prompts.write_text("one\ntwo\nthree\n")
    monkeypatch.setattr(sys, "stderr", shown)
    argv = ["generate", f"checkpoint.dir={checkpoint}", F32, "max_new_tokens=2", "batch_size=2"]
    assert cli.main([*argv, f"prompts_file={prompts}", f"output={tmp_path / 'a.jsonl'}"]) == 0
    assert "answering" in shown.getvalue()


def test_the_system_message_is_written_and_read_again(checkpoint: Path, tmp_path: Path) -> None:
    argv = ["generate", f"checkpoint.dir={checkpoint}", F32, "max_new_tokens=2"]
    files = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    assert cli.main([*argv, "prompt=hi", "system=be brief", f"output={files[0]}"]) == 0
    assert cli.main([*argv, f"prompts_file={files[0]}", f"output={files[1]}"]) == 0
    first, again = (json.loads(file.read_text()) for file in files)
    assert (first["system"], first["prompt"]) == ("be brief", "hi")
    assert again == first


def test_an_answer_that_is_cut_says_so(checkpoint: Path, tmp_path: Path) -> None:
    argv = ["generate", f"checkpoint.dir={checkpoint}", F32, f"output={tmp_path / 'a.jsonl'}"]
    assert cli.main([*argv, "prompt=what", "max_new_tokens=3"]) == 0
    row = json.loads((tmp_path / "a.jsonl").read_text())
    assert (row["num_tokens"], row["finish_reason"]) == (3, "length")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Token ids of all prompts, as the model gets them."""
    found: list[list[int]] = []
    generate_batch = models.generate_batch

    def listen(model: Any, prompts: Sequence[list[int]], **options: Any) -> Iterator[Any]:
        found.extend(prompts)
        return generate_batch(model, prompts, **options)

    monkeypatch.setattr(models, "generate_batch", listen)
    return found


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stdin", "options", "shown"),
    [
        (io.StringIO, [], "two\n{}\n"),
        (io.StringIO, ["stream=false"], "two\n{}\n"),
        (Terminal, [], ">>> two\n>>> >>> {}\n>>> \n"),  # and what the user types
    ],
)
def test_a_conversation_has_all_that_was_said_before(
    checkpoint: Path,
    adapter: Path,
    asked: list[list[int]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    stdin: type[io.StringIO],
    options: list[str],
    shown: str,
) -> None:
    argv = ["generate", f"checkpoint.dir={checkpoint}", f"adapter.path={adapter}", F32]
    argv += ["max_new_tokens=5", "interactive=true", *options]
    monkeypatch.setattr(sys, "stdin", stdin("what comes after one\n\nand then\n"))
    assert cli.main(argv) == 0
    captured = capsys.readouterr()
    tokenizer = Tokenizer.from_dir(checkpoint)
    first = [{"role": "user", "content": "what comes after one"}]
    then = [{"role": "assistant", "content": "two"}, {"role": "user", "content": "and then"}]
    texts = [tokenizer.render_chat(m, add_generation_prompt=True) for m in (first, first + then)]
    assert [tokenizer.decode(ids, skip_special_tokens=False) for ids in asked] == texts
    head, tail = shown.split("{}")
    assert captured.out.startswith(head)
    assert captured.out.endswith(tail)
    assert captured.err == ""


@pytest.mark.parametrize("when", ["asked", "answering"])
def test_ctrl_c_ends_a_conversation_quietly(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def interrupt(*_: object, **__: object) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    where = "builtins.input" if when == "asked" else "qlora_builders.models.generate_batch"
    monkeypatch.setattr(where, interrupt)
    assert cli.main(["generate", f"checkpoint.dir={checkpoint}", F32, "interactive=true"]) == 0
    assert capsys.readouterr() == ("\n", "")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("word " * 200, r"the conversation has \d+ tokens, which leaves no room for an answer in "),
        ("caf\udce9", "stdin: not UTF-8 text: "),
    ],
)
def test_what_a_conversation_cannot_hold(
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    said: str,
    message: str,
) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(said.encode("utf-8", "surrogateescape")), "utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    assert cli.main(["generate", f"checkpoint.dir={checkpoint}", F32, "interactive=true"]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_system_message_begins_the_conversation(
    checkpoint: Path, asked: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi"))
    argv = ["generate", f"checkpoint.dir={checkpoint}", F32, "max_new_tokens=2"]
    assert cli.main([*argv, "interactive=true", "system=be brief"]) == 0
    assert cli.main([*argv, "prompt=hi", "system=be brief"]) == 0
    assert asked[0] == asked[1]
