"""Names that the system refuses are one message with their key, whatever takes them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from qlora_builders import cli
from qlora_builders.files.outputs import fault_of_path

KEYS = {
    "checkpoint.dir": "generate prompt=x",
    "tokenizer.path": "generate prompt=x",
    "adapter.path": "generate prompt=x",
    "data.train": "finetune",
    "data.eval": "finetune",
    "output_dir": "finetune",
    "training.resume": "finetune",
    "--config-dir": "finetune",
    "prompts_file": "generate",
    "output": "generate prompt=x",
    "components": "inspect",
    "base": "merge output_dir=m adapter.path=a",
    "report": "merge output_dir=m adapter.path=a",
}
OTHER_VERBS = [
    ("checkpoint.dir", "inspect"),
    ("checkpoint.dir", "estimate"),
    ("checkpoint.dir", "quantize output_dir=q"),
    ("output_dir", "quantize"),
    ("output_dir", "dpo experiment=demo_dpo"),
    ("output", "evaluate"),
    ("output", "plan bits=4"),
    ("output", "report run"),
]
KINDS = {
    "a long name": "x" * 300,
    "a long path": "/".join(["d" * 200] * 25),
    "NUL": "a\0b",
    "bytes that are no text": "a\udcffb",
    "half a character": "a\ud800b",
    "a link to itself": "loop",
    "below one": "loop/x",
    "locked": "locked/x",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("key", "command"), [*KEYS.items(), *OTHER_VERBS])
def test_a_name_that_cannot_be(
    key: str,
    command: str,
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    _lock(monkeypatch)
    assert cli.main([*command.split(), f"{key}={KINDS[kind]}"]) == 2
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert line.startswith("error: ")
    assert key in line
    assert output.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]


def _lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Permissions do not bind the user that tests may run as."""
    stat = os.stat

    def refusing(path: Any, **options: Any) -> os.stat_result:
        if str(path).endswith("locked/x"):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", refusing)


def test_a_file_on_the_way_is_named_with_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    for key in ("checkpoint.dir", "adapter.path", "prompts_file", "output"):
        words = ["generate", *(["prompt=x"] if key != "prompts_file" else []), f"{key}=file/x"]
        assert cli.main(words) == 2
        error = capsys.readouterr().err
        assert key in error
        assert "file/x" in error


def test_what_is_there_or_could_be_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "file").touch()
    for name in (".", "dangling", "file", "file/x", "nowhere/x", "größe 数"):
        assert fault_of_path(str(tmp_path / name)) is None
