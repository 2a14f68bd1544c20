"""The completion scripts, in real shells on a terminal, as a person would use them."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qlora_builders.cli import VERBS, main
from qlora_builders.config.completion import FILES, INSTALL, all_values, all_words, script
from qlora_builders.config.knobs import knobs
from qlora_builders.config.schema import ROOTS

SHELLS = {"bash": ["--norc", "--noprofile"], "zsh": ["-f"], "fish": ["--no-config"]}
PREPARE = {
    "bash": "qlora() { printf 'LINE:%s\\n' \"$*\"; }",
    "zsh": "autoload -U compinit; compinit -D; qlora() { printf 'LINE:%s\\n' \"$*\" }",
    "fish": "function qlora; printf 'LINE:%s\\n' \"$argv\"; end",
}
# what is typed behind `qlora `, and the command line that it becomes
TYPED = {
    "fine\t": "finetune",
    "--vers\t": "--version",
    "evaluate --mul\t": "evaluate --multirun",
    "finetune training.compi\ton": "finetune training.compile=on",  # no space behind =
    "finetune training.compile=of\t": "finetune training.compile=off",
    "finetune x=1 method.use_do\tt\t": "finetune x=1 method.use_dora=true",
    "finetune experi\tdemo_q\t": "finetune experiment=demo_qlora",
    "dpo dpo.loss_type=h\tdata=pr\t": "dpo dpo.loss_type=hinge data=preference",
    "inspect model.arch=llama3_3\t": "inspect model.arch=llama3_3_70b",
    "finetune optimizer.weight\t0": "finetune optimizer.weight_decay=0",
    "finetune checkpoint.dir=a_f\trow\t": "finetune checkpoint.dir=a_folder/rows.jsonl",
    "finetune --config-dir a_f\t": "finetune --config-dir a_folder/",
    "finetune training.resume=a_f\t": "finetune training.resume=a_folder/",
    "report a_f\t": "report a_folder/",
    "configs sho\texperiment/demo_d\t": "configs show experiment/demo_dpo",
    "completion ba\t": "completion bash",
}


class Terminal:
    """A shell that believes it is used by a person."""

    def __init__(self, shell: str, folder: Path) -> None:
        executable = shutil.which(shell)
        if executable is None:
            pytest.skip(f"{shell} is not installed")
        self.pid, self.file = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            environment = {"PATH": "/usr/bin:/bin", "TERM": "dumb", "HOME": str(folder)}
            os.execve(executable, [shell, *SHELLS[shell], "-i"], environment)

    def type(self, text: str) -> None:
        os.write(self.file, text.encode())

    def read_until(self, pattern: str) -> str:
        """Returns the pattern's first group."""
        shown, deadline = "", time.monotonic() + 20
        while not (match := re.search(pattern, shown)):
            ready, _, _ = select.select([self.file], [], [], deadline - time.monotonic())
            assert ready, f"no {pattern!r} in {shown!r}"
            shown += os.read(self.file, 2**16).decode(errors="replace")
        return match[1]

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.file)


@contextmanager
def ready(shell: str, folder: Path) -> Iterator[Terminal]:
    """A terminal with the script, a function called qlora, and some files."""
    (folder / "a_folder").mkdir()
    (folder / "a_folder" / "rows.jsonl").touch()
    (folder / "script").write_text(script([shell], VERBS))
    terminal = Terminal(shell, folder)
    terminal.type(f"{PREPARE[shell]}\n. ./script\nqlora ready\n")
    terminal.read_until(r"\nLINE:(ready)")
    yield terminal
    terminal.close()


@pytest.fixture(scope="module", params=SHELLS)
def terminal(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Terminal]:
    with ready(request.param, tmp_path_factory.mktemp("home")) as terminal:
        yield terminal


@pytest.mark.parametrize("typed", TYPED)
def test_tab(terminal: Terminal, typed: str) -> None:
    terminal.type(f"qlora {typed}\n")
    became = terminal.read_until(r"\nLINE:([^\r\n]*)")
    assert became.rstrip(" /") == TYPED[typed].rstrip("/")  # zsh takes a last / away


def test_bash_where_an_equals_sign_ends_no_word(tmp_path: Path) -> None:
    with ready("bash", tmp_path) as terminal:
        terminal.type("COMP_WORDBREAKS=${COMP_WORDBREAKS//=/}\n")
        terminal.type("qlora finetune training.compi\tof\tcheckpoint.dir=a_folder/r\t\n")
        became = terminal.read_until(r"\nLINE:([^\r\n]*)").rstrip()
    assert became == "finetune training.compile=off checkpoint.dir=a_folder/rows.jsonl"


def test_every_key_is_a_word() -> None:
    words = all_words(VERBS)
    assert set(words) == {"", *VERBS}
    for verb, root in ROOTS.items():
        keys = {word.removesuffix("=") for word in words[verb]}
        assert knobs(root).keys() <= keys | {"optimizer"}
    assert FILES in words["report"]


def test_values_are_those_of_the_schema() -> None:
    values = all_values()
    assert values["*:training.dtype"] == ["float32", "bfloat16", "float16"]
    assert values["*:quantize"] == ["auto", "nf4", "none"]
    assert values["*:scale_format"] == ["geometric", "none", "bnb", "null"]
    assert values["merge:format"] != values["quantize:format"]
    assert values["*:optimizer"][0] == "adamw"
    assert "*:training.batch_size" not in values


def test_usage_and_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion"]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in INSTALL.values())
    assert main(["completion", "zhs"]) == 2
    assert capsys.readouterr().err == "error: no completion for 'zhs'; did you mean 'zsh'?\n"
