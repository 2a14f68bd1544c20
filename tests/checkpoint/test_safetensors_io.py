"""Directories appear complete or not at all, and replace only what they could have written."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qlora_builders.checkpoint import safetensors_io
from qlora_builders.checkpoint.safetensors_io import (
    LazyTensor,
    atomic_directory,
    clean_up,
    find_tensors,
    listed,
    read_tensor,
    remove_directory,
    write_shards,
    write_tensors,
)
from qlora_builders.errors import CheckpointError

MARKER = "config.json"


def lazy(name: str, value: float, load: Callable | None = None) -> LazyTensor:
    tensor = torch.full((10,), float(value))
    return LazyTensor(name, tensor.shape, tensor.dtype, load or (lambda: tensor))  # 40 bytes


def write(path: Path, text: str) -> None:
    with atomic_directory(path, marker=MARKER) as directory:
        (directory / MARKER).write_text(text)


# ---- atomic_directory ---------------------------------------------------------------------------


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
        monkeypatch.setattr(safetensors_io, "_exchange", lambda a, b: False)


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
from qlora_builders.checkpoint import safetensors_io
from qlora_builders.checkpoint.safetensors_io import atomic_directory, clean_up

folder, exchange = Path(sys.argv[1]), sys.argv[2] == "True"
calls_left = None
if not exchange:
    safetensors_io._exchange = lambda a, b: False

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
        patch.setattr(safetensors_io.shutil, "rmtree", lambda _: None)
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
            write_tensors({"a": torch.zeros(1 << 16)}, directory / MARKER)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (path / MARKER).read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# ---- shards -------------------------------------------------------------------------------------


def test_single_file(tmp_path: Path) -> None:
    write_shards([lazy("a", 1), lazy("b", 2)], tmp_path, max_shard_bytes=80)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert set(find_tensors(tmp_path)) == {"a", "b"}
    with safe_open(tmp_path / "model.safetensors", "pt") as handle:
        assert handle.metadata() == {"format": "pt"}  # transformers asks for it


def test_shards_and_index(tmp_path: Path) -> None:
    tensors = [lazy(name, i) for i, name in enumerate("abcde")]
    write_shards(tensors, tmp_path, max_shard_bytes=80)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert index["metadata"]["total_size"] == 200
    expected = [shards[0], shards[0], shards[1], shards[1], shards[2]]
    assert index["weight_map"] == dict(zip("abcde", expected, strict=True))
    assert [len(load_file(tmp_path / shard)) for shard in shards] == [2, 2, 1]
    for i, name in enumerate("abcde"):
        assert torch.equal(
            read_tensor(find_tensors(tmp_path)[name], name), torch.full((10,), float(i))
        )


def test_tensor_larger_than_a_shard_gets_its_own(tmp_path: Path) -> None:
    write_shards([lazy(name, 0) for name in "abc"], tmp_path, max_shard_bytes=1)
    assert len(list(tmp_path.glob("model-*-of-00003.safetensors"))) == 3


@pytest.mark.parametrize("max_shard_bytes", [40, 1000])
def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path, max_shard_bytes: int) -> None:
    alive: list[weakref.ref] = []  # the memory behind the tensors
    seen = []

    def load() -> torch.Tensor:
        memory = np.zeros(10, dtype=np.float32)
        alive.append(weakref.ref(memory))
        seen.append(sum(ref() is not None for ref in alive))
        return torch.from_numpy(memory)

    tensors = [lazy(name, 0, load) for name in "abc"]
    write_shards(tensors, tmp_path, max_shard_bytes=max_shard_bytes)
    assert seen == [1, 1, 1]


def test_listed() -> None:
    assert listed([]) == "none"
    assert listed(["a", "b"]) == "a, b"
    assert listed([str(i) for i in range(11)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 3 more"
