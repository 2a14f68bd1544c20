"""Directories appear complete or not at all, and replace only what they could have written."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_builders.errors import CheckpointError
from qlora_builders.files import folders
from qlora_builders.files.folders import atomic_directory, clean_up, remove_directory

MARKER = "config.json"


def write(path: Path, text: str) -> None:
    with atomic_directory(path, marker=MARKER) as directory:
        (directory / MARKER).write_text(text)


def test_directory_is_hidden_until_complete(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out"
    with atomic_directory(path, marker=MARKER) as directory:
        (directory / MARKER).write_text("new")
        assert not path.exists()
        assert directory.parent == path.parent  # one file system: the rename is atomic
    assert (path / MARKER).read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_permissions_are_those_of_an_ordinary_directory(tmp_path: Path) -> None:
    write(tmp_path / "out", "x")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("existing", [False, True])
def test_nothing_remains_of_a_failure(
    tmp_path: Path, error: type[BaseException], existing: bool
) -> None:
    path = tmp_path / "out"
    if existing:
        write(path, "old")

    def fail_halfway() -> None:
        with atomic_directory(path, marker=MARKER) as directory:
            (directory / MARKER).write_text("new")
            raise error

    with pytest.raises(error):
        fail_halfway()
    assert list(tmp_path.iterdir()) == ([path] if existing else [])
    if existing:
        assert (path / MARKER).read_text() == "old"


@pytest.fixture(params=["in one step", "in two"])
def exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """File systems that cannot swap two names need two renames."""
    if request.param == "in two":
        monkeypatch.setattr(folders, "_exchange", lambda a, b: False)


@pytest.mark.usefixtures("exchange")
def test_success_replaces_the_old_directory_whole(tmp_path: Path) -> None:
    path = tmp_path / "out"
    write(path, "old")
    (path / "stale.safetensors").touch()
    write(path, "new")
    assert [file.name for file in path.iterdir()] == [MARKER]
    assert (path / MARKER).read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_empty_directory_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "x")


def test_what_was_not_written_here_is_not_replaced(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "thesis").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"home: exists .*\(it holds thesis\); give another"):
        write(home, "x")
    (home / MARKER).touch()  # a folder beside the marker is still no checkpoint of ours
    with pytest.raises(CheckpointError, match=r"\(it holds thesis\)"):
        write(home, "x")
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "todo.txt").touch()
    with pytest.raises(CheckpointError, match=r"\(it holds todo.txt\)"):
        write(notes, "x")
    with pytest.raises(CheckpointError, match=r"todo.txt: is a file; give the path of a directory"):
        write(notes / "todo.txt", "x")
    assert sorted(f.name for f in tmp_path.rglob("*")) == [
        MARKER, "home", "notes", "thesis", "todo.txt"
    ]  # fmt: skip


# ---- death and full disks -----------------------------------------------------------------------

KILLED_AT_EVERY_CALL = """
import itertools, os, signal, sys
from pathlib import Path
from qlora_builders.files import folders
from qlora_builders.files.folders import atomic_directory, clean_up

folder, exchange = Path(sys.argv[1]), sys.argv[2] == "True"
calls_left = None
if not exchange:
    folders._exchange = lambda a, b: False

def audit(event, args):
    global calls_left
    if calls_left is not None and (event == "open" or event.startswith(("os.", "ctypes."))):
        calls_left -= 1
        if calls_left < 0:
            calls_left = None  # os.kill is audited too
            os.kill(os.getpid(), signal.SIGKILL)

def write(text):
    with atomic_directory(folder / "out", marker="config.json") as directory:
        (directory / "config.json").write_text(text)

sys.addaudithook(audit)
for count in itertools.count():  # a fork shares the import of torch
    write("old")
    child = os.fork()
    if child == 0:
        calls_left = count
        write("new")
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    there = (folder / "out").exists()
    clean_up(folder)
    names = sorted(path.name for path in folder.iterdir())
    print(code, there, names == ["out"], (folder / "out" / "config.json").read_text())
    if code != -signal.SIGKILL:
        break
"""


@pytest.mark.parametrize("exchange", [True, False])
def test_a_process_killed_at_any_call_leaves_the_old_or_the_new(
    tmp_path: Path, exchange: bool
) -> None:
    command = [sys.executable, "-c", KILLED_AT_EVERY_CALL, str(tmp_path), str(exchange)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    killed, finished = lines[:-1], lines[-1]
    assert finished == ["0", "True", "True", "new"]
    assert {(code, alone) for code, _, alone, _ in killed} == {(str(-signal.SIGKILL), "True")}
    texts = [text for *_, text in killed]
    assert texts == sorted(texts, reverse=True)  # old ..., then new ...
    assert texts.count("old") > 5
    assert texts.count("new") > 0
    # the swap leaves no moment without; two renames leave one, which clean_up mends
    assert all(there == "True" for _, there, *_ in killed) == exchange


def test_removal_is_not_seen_halfway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out"
    write(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(folders.shutil, "rmtree", lambda _: None)
        remove_directory(path)
    assert not path.exists()
    assert len(list(tmp_path.iterdir())) == 1
    clean_up(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_names_the_directory_and_leaves_the_old_one(tmp_path: Path) -> None:
    """A limit on file sizes stands in for a full disk; see also the recipe's test on a real one."""
    path = tmp_path / "out"
    write(path, "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with (
            pytest.raises(CheckpointError, match=r"out: cannot be written: .*File too large"),
            atomic_directory(path, marker=MARKER) as directory,
        ):
            (directory / MARKER).write_bytes(bytes(1 << 18))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (path / MARKER).read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
