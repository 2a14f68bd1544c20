"""Results are written whole or not at all, and what cannot be written is seen beforehand."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path
from typing import NoReturn

import pytest

from qlora_builders.errors import ConfigError, QLoRAError
from qlora_builders.files.outputs import (
    append_rows,
    check_new,
    check_writable,
    growing,
    write_whole,
)


def test_written_into_new_folders_and_over_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "result.json"
    for content in (b"one", b"2"):
        check_writable(file, "output")
        write_whole(file, content)
        assert file.read_bytes() == content
        assert [path.name for path in file.parent.iterdir()] == ["result.json"]


def test_links_are_replaced_and_not_followed(tmp_path: Path) -> None:
    precious, file = tmp_path / "precious", tmp_path / "result"
    precious.write_text("keep me")
    file.symlink_to(precious)
    (tmp_path / "result.partial").symlink_to(precious)
    write_whole(file, b"new")
    assert (precious.read_text(), file.read_text(), file.is_symlink()) == ("keep me", "new", False)


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = tmp_path / "result"
    write_whole(file, b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(QLoRAError, match=r"/result: cannot be written: No space left on device$"):
        write_whole(file, b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
    assert file.read_bytes() == b"old"
    with pytest.raises(QLoRAError, match=r"^/dev/full: cannot be written: No space left on device"):
        append_rows(Path("/dev/full"), [{"step": 1}])


def test_results_are_new(tmp_path: Path) -> None:
    file = tmp_path / "result"
    check_new(file, "output")
    (tmp_path / "result.partial").touch()
    check_new(file, "output")  # what `write_whole` left when it was killed
    with pytest.raises(
        ConfigError, match=r"^output=.*/result: .*/result.partial holds what an int"
    ):
        check_new(file, "output", grows=True)
    file.touch()
    with pytest.raises(ConfigError, match=r"^output=.*/result exists; choose another name$"):
        check_new(file, "output")


def test_a_file_that_grows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, partial = tmp_path / "a" / "result", tmp_path / "a" / "result.partial"
    with growing(file) as write:
        write(b"one\n")
        assert (file.exists(), partial.read_bytes()) == (False, b"one\n")
        write(b"two\n")
    assert (file.read_bytes(), partial.exists()) == (b"one\ntwo\n", False)
    file.unlink()
    with pytest.raises(KeyboardInterrupt), growing(file) as write:
        raise KeyboardInterrupt
    assert list(file.parent.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_a_disk_that_fills_keeps_whole_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, partial = tmp_path / "result", tmp_path / "result.partial"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill() -> None:
        with growing(file) as write:
            write(b"one\n")
            resource.setrlimit(resource.RLIMIT_FSIZE, (6, hard))
            write(b"two\n")

    message = r"/result: cannot be written: File too large$"
    try:
        with pytest.raises(QLoRAError, match=message):
            fill()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert partial.read_bytes() == b"one\n"
    assert capsys.readouterr().err == f"what was finished is in {partial}\n"
    with pytest.raises(QLoRAError, match=r"/result: cannot be written: File exists"), growing(file):
        pass


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    check_writable(tmp_path / "new", "output_dir", folder=True)
    check_writable(tmp_path, "output_dir", folder=True)
    with pytest.raises(ConfigError, match=r"^output_dir=.*/file is a file; give the name of a new"):
        check_writable(file, "output_dir", folder=True)
    with pytest.raises(ConfigError, match=r"is a folder; give the name of a file$"):
        check_writable(tmp_path, "output")
    with pytest.raises(ConfigError, match=r"/file is a file, not a folder; choose another place"):
        check_writable(file / "a" / "b", "output")
    with pytest.raises(ConfigError, match=r"^output=/dev/null is no plain file"):
        check_writable(Path("/dev/null"), "output")
    with pytest.raises(ConfigError, match=r"cannot be used: File name too long; choose another"):
        check_writable(tmp_path / ("a" * 300), "output")
