"""Text of files and models never acts on a terminal, and one problem is one line of an error."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

from qlora_builders import cli
from qlora_builders.checkpoint.tensor_files import read_header
from qlora_builders.config.entry import report
from qlora_builders.config.shipped import shipped_dir
from qlora_builders.console import PlainConsole, table_console
from qlora_builders.errors import CheckpointError, ConfigError, QLoRAError
from qlora_builders.sweep import Result, results_table
from qlora_builders.training.loggers import ProgressReport
from qlora_builders.visible import say, visible, visible_json

ACTS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
# what a file or a model may hold -> how it is shown
TEXTS = {
    "a\x1b[2Jb": "a\\x1b[2Jb",
    "a\x00b": "a\\x00b",
    "a\x07b": "a\\x07b",
    "a\x08\x08b": "a\\x08\\x08b",
    "a\rb": "a\\rb",
    "a\x0b\x0cb": "a\\x0b\\x0cb",
    "\x1b]8;;http://x\x1b\\a\x1b]8;;\x1b\\": "\\x1b]8;;http://x\\x1b\\a\\x1b]8;;\\x1b\\",
    "\x1b]0;title\x07": "\\x1b]0;title\\x07",
    "a\x7fb": "a\\x7fb",
    "a\x9b2Jb": "a\\x9b2Jb",
    "a\x85b": "a\\x85b",
    "a\u2028b\u2029c": "a\\u2028b\\u2029c",
    "a\u202eb\u202c": "a\\u202eb\\u202c",
    "a\u2066b\u2069": "a\\u2066b\\u2069",
    "a\ud800b": "a\\ud800b",
    # these are text, in whatever language, and no markup of the console's
    "[link=http://x]a[/link]": "[link=http://x]a[/link]",
    "[bold]a[/]": "[bold]a[/]",
    "a[/b].jsonl": "a[/b].jsonl",
    ":smiley:": ":smiley:",
    "é \u200d\u200c\u3000\xa0 \u0645\u06cc": "é \u200d\u200c\u3000\xa0 \u0645\u06cc",
}


def columns(*texts: str) -> Table:
    table = Table(title=texts[0], caption=texts[0])
    table.add_column(texts[0], overflow="fold")
    table.add_row(*texts)
    return table


def through_recipe(name: str, function: str) -> Callable[..., Any]:
    recipe = cli.load_recipe(shipped_dir("recipes") / f"{name}.py")
    found: Callable[..., Any] = recipe.__globals__[function]  # type: ignore[attr-defined]
    return found


class OneTokenEach:
    """A tokenizer whose tokens are characters, for what a model says."""

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def streamed(text: str) -> None:
    through_recipe("generate", "print_answer")(([ord(c)] for c in text), OneTokenEach())


def at_once(text: str) -> None:
    steps = ([ord(c)] for c in text)
    through_recipe("generate", "print_answer")(steps, OneTokenEach(), stream=False)


def answers(text: str) -> None:
    row = {"prompt": text, "reference": text, "answer": text, "right": False}
    table_console().print(through_recipe("evaluate", "answer_table")([row], text))


def sweep(text: str) -> None:
    result = Result(text, {"k": text}, text, [], error=text, status=text)
    table_console().print(results_table([result]))


# name -> what shows a text
DOORS: dict[str, Callable[[str], object]] = {
    "say": say,
    "console": lambda text: PlainConsole(soft_wrap=True).print(text),
    "table console": lambda text: table_console().print(text),
    "terminal": lambda text: PlainConsole(force_terminal=True, color_system=None).print(text),
    "cell": lambda text: table_console().print(columns(text)),
    "progress": lambda text: ProgressReport(3).say(text),
    "error": lambda text: report(QLoRAError(text)),
    "error of the system": lambda text: report(OSError(2, "No such file", text)),
    "error of a package": lambda text: report(ImportError(text)),
    "streamed answer": streamed,
    "answer": at_once,
    "table of answers": answers,
    "table of a sweep": sweep,
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_shown(text: str, door: str, capsys: pytest.CaptureFixture[str]) -> None:
    DOORS[door](text)
    captured = capsys.readouterr()
    shown = captured.out + captured.err
    assert not ACTS.search(shown)
    assert TEXTS[text] in shown
    assert shown.encode()


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_json(text: str) -> None:
    for indent in (None, 2):
        written = visible_json({text: [text, 1]}, indent)
        assert not ACTS.search(written)
        assert json.loads(written.encode()) == {text: [text, 1]}


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_visible(text: str) -> None:
    assert visible(text) == TEXTS[text]
    assert visible(visible(text)) == visible(text)
    assert visible(f"{text}\n\t{text}") == f"{TEXTS[text]}\n\t{TEXTS[text]}"
    assert visible(f"\n\t{text}", keep="") == f"\\n\\t{TEXTS[text]}"


def test_a_path_is_shown_like_a_text(capsys: pytest.CaptureFixture[str]) -> None:
    ProgressReport(3).say(Path("a\x1b[2J\nb"))
    assert capsys.readouterr().out == "a\\x1b[2J\\nb\n"


def test_an_encoding_that_lacks_a_character() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qlora_builders.cli", "finetune", "--print-config", "output_dir=é☃"],
        capture_output=True,
        check=True,
        env=os.environ
        | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(Path(cli.__file__).parents[1])},
    )
    assert b"output_dir: \\xe9\\u2603\n" in done.stdout


# ---- one line per problem -----------------------------------------------------------------------

FORGED = "a\nerror: all is well\r\nb\u2028c\x85d\x0be"


def lines_of(error: Exception, capsys: pytest.CaptureFixture[str]) -> list[str]:
    report(error)
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    return lines


def test_a_value_cannot_begin_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = lines_of(ConfigError(f"{FORGED} is wrong"), capsys)
    shown = "a\\nerror: all is well\\r\\nb\\u2028c\\x85d\\x0be is wrong"
    assert line == f"error: {shown}"
    assert lines_of(ConfigError(FORGED, "two"), capsys)[1:] == ["error: two"]
    assert lines_of(OSError(2, "No such file", FORGED), capsys)[0].startswith("error: a\\nerror:")
    assert lines_of(OSError(2, "No such file", b"a\nb\xff"), capsys)[0].startswith(
        "error: a\\nb\\udcff cannot be used: No such file"
    )
    assert lines_of(QLoRAError(""), capsys) == ["error: QLoRAError"]
    assert lines_of(QLoRAError("a" * 10**7), capsys)[0].endswith(f" ... {'a' * 1000}")


def test_problems_are_the_arguments() -> None:
    error = ConfigError("one", "two\nmore")
    assert (error.problems, str(error)) == (("one", "two\nmore"), "one\ntwo\nmore")


def header(name: str) -> bytes:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 3]}
    text = json.dumps({name: entry}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(3)


def test_of_a_tensor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (FORGED, "x" * 10**6, "\x1b[2J", "\ud800"):
        (tmp_path / "a.safetensors").write_bytes(header(name))
        with pytest.raises(CheckpointError) as caught:
            read_header(tmp_path / "a.safetensors")
        (line,) = lines_of(caught.value, capsys)
        assert not ACTS.search(line)
        assert len(line) < 2100


# command lines with a value that has lines of its own; F is FORGED as a folder has it
COMMANDS = (
    "finetune data.train=F",
    "finetune F=3",
    "finetune +F=3",
    "finetune training.F=3",
    "finetune training.seed=F",
    "finetune method=F",
    "finetune experiment=F",
    "finetune tokenizer.path=F",
    "finetune checkpoint.dir=F",
    "finetune optimizer.component=F",
    "finetune loggers=[F]",
    "finetune components=[{match: F, kind: lora}]",
    "finetune train=[F]",
    "finetune output_dir=file/F",
    "finetune --config-dir F",
    "finetune --F",
    "finetune data.train=F training.seed=x",
    "finetune --multirun training.seed=F,x",
    "generate prompt=hi checkpoint.dir=F",
    "generate prompt=hi checkpoint.format=F",
    "generate prompt=hi adapter.path=F",
    "generate prompts_file=F",
    "generate prompt=hi output=F",
    "evaluate data.eval=F",
    "inspect model.arch=F",
    "estimate memory=F",
    "merge adapter.path=F output_dir=out",
    "plan bits=4.6 output=F",
    "report F",
    "configs show F",
    "configs validate F",
    "configs cp F F.yaml",
    "configs F",
    "F",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_of_a_command(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    words = [word.replace("F", "a\nerror: all is well\x1b[2J") for word in shlex.split(command)]
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert lines
    assert all(line.startswith("error: ") for line in lines), captured.err
    assert not [line for line in lines if line.startswith("error: all is well")]
    assert not ACTS.search(captured.err + captured.out)


def test_of_a_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "mine" / "experiment"
    folder.mkdir(parents=True)
    name = "a\\nerror: all is well\\e[2J\\0\\u202E"  # as YAML escapes it
    (folder / "nice.yaml").write_text(
        f'# @package _global_\n# what \x9b for\n"{name}": 1\ntraining: {{"{name}": "{name}"}}\n'
    )
    (folder / "right.yaml").write_text(f'# @package _global_\noutput_dir: "{name}"\n')
    for words in (
        ["finetune", "experiment=nice", "--config-dir=mine"],
        ["configs", "validate", "nice", "--config-dir=mine"],
        ["configs", "show", "nice", "--config-dir=mine"],
        ["configs", "ls", "--config-dir=mine"],
        ["finetune", "experiment=right", "--config-dir=mine", "--print-config"],
    ):
        cli.main(words)
        captured = capsys.readouterr()
        assert captured.out + captured.err
        assert not ACTS.search(captured.err + captured.out), words
        lines = captured.err.splitlines()
        assert all(line.startswith("error: ") for line in lines), captured.err
        assert not [line for line in lines if line.startswith("error: all is well")]


def test_what_a_console_writes_itself_stays() -> None:
    file = io.StringIO()
    console = PlainConsole(force_terminal=True, color_system="standard", file=file)
    console.print("\x1b[2J", style="red")
    assert file.getvalue() == "\x1b[31m\\x1b[2J\x1b[0m\n"
