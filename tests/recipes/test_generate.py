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
from recipe_runs import F32

from qlora_builders import cli, models
from qlora_builders.data import Tokenizer

Ask = Callable[..., str]
THREE = "one\ntwo\nthree\n"


@pytest.fixture
def ask(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Runs generate; gives what it prints. Nothing comes on stderr."""

    def run(*words: str, base: Path = checkpoint) -> str:
        capsys.readouterr()
        assert cli.main(["generate", f"checkpoint.dir={base}", F32, *words]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out

    return run


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_generate_answers_streamed_or_not(ask: Ask, adapter: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("what comes after three\nwhat comes after five\n")
    tuned, file = f"adapter.path={adapter}", f"prompts_file={prompts}"
    expected = ">>> what comes after three\nfour\n>>> what comes after five\nsix\n"
    for stream in ("stream=true", "stream=false"):
        assert ask(tuned, "prompt=what comes after one", stream) == "two\n"
        assert ask(tuned, file, stream) == expected
    assert ask(tuned, file, "batch_size=2") == expected


def test_sampling_depends_on_the_seed_alone(ask: Ask) -> None:
    options = ["prompt=what", "max_new_tokens=20", "temperature=1.0", "top_k=50", "top_p=0.9"]
    first, again, other = (ask(*options, f"seed={seed}") for seed in (0, 0, 1))
    assert first == again != other


def test_without_a_template_prompts_are_those_of_training(
    ask: Ask, checkpoint: Path, rows: Path, train_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    base = shutil.copytree(checkpoint, tmp_path / "plain")
    config = json.loads((base / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    tuned = f"adapter.path={train_adapter(base, rows, tmp_path / 'run')}"
    question = "prompt=what comes after two"
    assert ask(tuned, question, base=base) == "three\n"
    assert ask(tuned, f"{question}\n", "chat=false", base=base) == "three\n"
    assert ask(tuned, question, "chat=false", base=base) != "three\n"  # no newline comes behind


@pytest.mark.parametrize("options", [[], ["stream=false"], ["batch_size=3"]])
def test_answers_to_rows_in_a_file(
    ask: Ask, refused: Callable[..., str], adapter: Path, tmp_path: Path, options: list[str]
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
    words = [f"adapter.path={adapter}", f"prompts_file={file}", f"output={output}", *options]
    words += ["data.columns.prompt=question", "data.columns.completion=answer", "max_new_tokens=9"]
    assert ask(*words) == f"wrote {output} (3 answers)\n"
    text = output.read_text()
    assert "dréi" in text  # as it was written
    answers = read(output)
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
    assert f"output={output} exists; choose another name" in refused("generate", *words)
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
    prompts.write_text(THREE)
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
    assert [row["prompt"] for row in read(tmp_path / "answers.jsonl.partial")] == ["one", "two"]
    assert cli.main(argv) == 2
    assert "rename or remove it, or choose another name" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_for_terminals(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, shown = tmp_path / "prompts.txt", Terminal()
    prompts.write_text(THREE)
    monkeypatch.setattr(sys, "stderr", shown)
    argv = ["generate", f"checkpoint.dir={checkpoint}", F32, "max_new_tokens=2", "batch_size=2"]
    assert cli.main([*argv, f"prompts_file={prompts}", f"output={tmp_path / 'a.jsonl'}"]) == 0
    assert "answering" in shown.getvalue()


def test_the_system_message_is_written_and_read_again(ask: Ask, tmp_path: Path) -> None:
    """And an answer that is cut says so."""
    files = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    ask("prompt=hi", "system=be brief", f"output={files[0]}", "max_new_tokens=2")
    ask(f"prompts_file={files[0]}", f"output={files[1]}", "max_new_tokens=2")
    (first,), (again,) = map(read, files)
    assert (first["system"], first["prompt"]) == ("be brief", "hi")
    assert (first["num_tokens"], first["finish_reason"]) == (2, "length")
    assert again == first


# ---- conversations ------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("stdin", "options", "shown"),
    [
        (io.StringIO, [], "two\n{}\n"),
        (io.StringIO, ["stream=false"], "two\n{}\n"),
        (Terminal, [], ">>> two\n>>> >>> {}\n>>> \n"),  # and what the user types
    ],
)
def test_a_conversation_has_all_that_was_said_before(
    ask: Ask,
    checkpoint: Path,
    adapter: Path,
    asked: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    stdin: type[io.StringIO],
    options: list[str],
    shown: str,
) -> None:
    monkeypatch.setattr(sys, "stdin", stdin("what comes after one\n\nand then\n"))
    out = ask(f"adapter.path={adapter}", "max_new_tokens=5", "interactive=true", *options)
    tokenizer = Tokenizer.from_dir(checkpoint)
    first = [{"role": "user", "content": "what comes after one"}]
    then = [{"role": "assistant", "content": "two"}, {"role": "user", "content": "and then"}]
    texts = [tokenizer.render_chat(m, add_generation_prompt=True) for m in (first, first + then)]
    assert [tokenizer.decode(ids, skip_special_tokens=False) for ids in asked] == texts
    head, tail = shown.split("{}")
    assert out.startswith(head)
    assert out.endswith(tail)


@pytest.mark.parametrize("when", ["asked", "answering"])
def test_ctrl_c_ends_a_conversation_quietly(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def interrupt(*_: object, **__: object) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    where = "builtins.input" if when == "asked" else "qlora_builders.models.generate_batch"
    monkeypatch.setattr(where, interrupt)
    assert ask("interactive=true") == "\n"


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("word " * 200, r"the conversation has \d+ tokens, which leaves no room for an answer in "),
        ("caf\udce9", "stdin: not UTF-8 text: "),
    ],
)
def test_what_a_conversation_cannot_hold(
    refused: Callable[..., str],
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: str,
    message: str,
) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(said.encode("utf-8", "surrogateescape")), "utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    error = refused("generate", f"checkpoint.dir={checkpoint}", F32, "interactive=true")
    assert re.search(message, error)


def test_a_system_message_begins_the_conversation(
    ask: Ask, asked: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi"))
    for said in ("interactive=true", "prompt=hi"):
        ask(said, "system=be brief", "max_new_tokens=2")
    assert asked[0] == asked[1]
