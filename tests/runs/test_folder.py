"""Which checkpoint a run starts from, and who may use its directory."""

from __future__ import annotations

import json
import math
import multiprocessing
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_builders.errors import CheckpointError, ConfigError
from qlora_builders.files.folders import write_manifest
from qlora_builders.files.outputs import how_to_go_on, last_checkpoint, step_folders
from qlora_builders.runs import setup
from qlora_builders.runs.folder import (
    Start,
    find_start,
    remove_old_steps,
    run_directory,
)
from qlora_builders.runs.state import random_state


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.yaml").write_text("")
    return path


def add(run: Path, *steps: int) -> None:
    """What makes a directory a step checkpoint, and no weights."""
    for step in steps:
        folder = run / "checkpoints" / f"step_{step}"
        folder.mkdir(parents=True)
        (folder / "train_state.json").write_text(json.dumps({"step": step, "note": "x"}))
        optimizer = {"state": {}, "param_groups": []}
        random = random_state(torch.device("cpu"))
        torch.save({"optimizer": optimizer, "random": random}, folder / "train_state.pt")
        write_manifest(folder)


def damage(run: Path, step: int) -> None:
    with (run / "checkpoints" / f"step_{step}" / "train_state.json").open("a") as file:
        file.write(" ")


def start(run: Path, resume: str | None = "auto", overwrite: bool = False) -> Start:
    return find_start(run, resume=resume, overwrite=overwrite)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


# ---- where it starts ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adapter", "model"])
def test_a_finished_run_is_not_begun_anew(run: Path, name: str) -> None:
    (run / name).mkdir()
    with pytest.raises(
        ConfigError, match=f"holds the {name}/ of a finished run, and no checkpoint"
    ):
        start(run)
    assert start(run, None, overwrite=True).step == 0
    assert start(run, "auto", overwrite=True).step == 0
    add(run, 3)
    assert start(run).step == 3


def test_auto_takes_the_newest(run: Path) -> None:
    add(run, 9, 10, 100)
    (run / "checkpoints" / "step_200.damaged").mkdir()
    (run / "checkpoints" / ".step_300.x.partial").mkdir()
    found = start(run)
    assert (found.step, found.about["note"]) == (100, "x")
    assert found.folder == run / "checkpoints" / "step_100"
    assert found.run_dir == run
    assert found.messages == (f"resumed after step 100 from {found.folder}",)
    assert last_checkpoint(run) == f"the last checkpoint is {found.folder}"
    assert how_to_go_on(run) == f"{last_checkpoint(run)}; training.resume=auto goes on from it"


def test_auto_skips_what_is_damaged_and_says_why(run: Path) -> None:
    add(run, 1, 2, 3)
    damage(run, 3)
    damage(run, 2)
    found = start(run)
    assert found.step == 1
    first, second, _ = found.messages
    assert first.startswith("warning: a damaged checkpoint is skipped: ")
    assert "step_3: train_state.json has 25 bytes, but 24 were written" in first
    assert "step_2: train_state.json" in second
    with run_directory(run, found, overwrite=False, keep_last=9):
        # out of the way, so that `keep_last` does not keep them, but not lost
        assert names(run) == ["step_1", "step_2.damaged", "step_3.damaged"]


def test_auto_starts_afresh_without_a_checkpoint(run: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / "new", run):
        found = start(folder)
        assert (found.step, found.folder, found.run_dir) == (0, None, None)
        assert found.messages == (f"no checkpoint in {folder} to resume from: a new run",)
    assert last_checkpoint(run) == "no checkpoint was written"
    assert how_to_go_on(run) == (
        "no checkpoint was written, so there is nothing to go on from; start again with "
        "overwrite=true or in another output_dir"
    )
    add(run, 5)
    damage(run, 5)
    found = start(run)
    assert (found.step, found.run_dir, len(found.messages)) == (0, None, 2)


def test_a_run_that_was_killed_at_once_can_be_started(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml.partial").touch()
    assert start(run, None) == Start()
    assert start(run).step == 0


def test_a_path_is_taken_as_it_is(run: Path, tmp_path: Path) -> None:
    add(run, 1, 2)
    first, last = step_folders(run)
    assert start(tmp_path / "new", str(first)).step == 1
    assert start(run, str(last)).step == 2
    other = tmp_path / "other"  # a run without checkpoints
    other.mkdir()
    (other / "config.yaml").touch()
    message = r"holds a run whose last checkpoint is not training.resume=.*step_1; choose a new"
    for folder in (run, other):
        with pytest.raises(ConfigError, match=message):
            start(folder, str(first))
    damage(run, 1)
    with pytest.raises(CheckpointError, match=r"step_1: train_state.json has 25 bytes"):
        start(tmp_path / "new", str(first))
    with pytest.raises(CheckpointError, match=r"step_7: no such directory; give one named"):
        start(tmp_path / "new", str(run / "checkpoints" / "step_7"))


# ---- whose it is --------------------------------------------------------------------------------


def test_a_directory_is_taken_only_as_asked(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not empty; choose another, or set overwrite=true$"):
        start(run, None)
    add(run, 1)
    with pytest.raises(ConfigError, match=r"is not empty; choose another, go on with its run by"):
        start(run, None)
    assert start(run, None, overwrite=True) == Start()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").touch()
    with pytest.raises(ConfigError, match=r"notes is not empty; choose another$"):
        start(tmp_path / "notes", None)
    for resume, overwrite, does in (("auto", False, "goes on with"), (None, True, "replaces")):
        with pytest.raises(ConfigError, match=rf"notes holds no run; .* {does} only runs"):
            start(tmp_path / "notes", resume, overwrite)


def test_overwriting_removes_everything(run: Path, tmp_path: Path) -> None:
    add(run, 1)
    (tmp_path / "elsewhere").mkdir()
    (run / "adapter").symlink_to(tmp_path / "elsewhere")
    with run_directory(run, Start(), overwrite=True, keep_last=9):
        assert list(run.iterdir()) == []
    assert (tmp_path / "elsewhere").is_dir()


def test_what_dead_processes_left_is_removed(run: Path) -> None:
    add(run, 1)
    found = start(run)
    (run / "report.html").touch()  # what is no run's may come meanwhile
    for folder in (run, run / "checkpoints"):
        (folder / ".step_2.abc.partial").mkdir()
        (folder / ".step_2.abc.partial" / "file").touch()
    (run / ".adapter.abc.old").mkdir()
    (run / ".adapter.abc.old" / "adapter_config.json").touch()
    with run_directory(run, found, overwrite=False, keep_last=9):
        assert names(run) == ["step_1"]
        left = ["adapter", "checkpoints", "config.yaml", "report.html"]
        assert sorted(p.name for p in run.iterdir()) == left
    assert (run / "adapter" / "adapter_config.json").exists()


def _hold(run: Path, held: object, done: object) -> None:
    with run_directory(run, Start(), overwrite=False, keep_last=9):
        held.set()  # type: ignore[attr-defined]
        done.wait()  # type: ignore[attr-defined]


def test_two_processes_cannot_share_a_directory(run: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"overwrite": False, "keep_last": 9}
    with (
        run_directory(tmp_path / "new", Start(), **options),
        pytest.raises(ConfigError, match=r"new is in use by another process"),
        run_directory(tmp_path / "new", Start(), **options),
    ):
        pass
    assert (tmp_path / "new").is_dir()  # the first one's, empty as it is
    context = multiprocessing.get_context("spawn")
    held, done = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(run, held, done))
    process.start()
    try:
        assert held.wait(60)
        with (
            pytest.raises(ConfigError, match=r"run is in use by another process"),
            run_directory(run, Start(), overwrite=True, keep_last=9),
        ):
            pass
        assert (run / "config.yaml").exists()
        process.kill()  # a lock of a dead process is no lock
        process.join()
        with run_directory(run, Start(), overwrite=False, keep_last=9):
            pass
    finally:
        process.kill()
        process.join()


def take(run: Path, result: str | None = None, step: int | None = None) -> None:
    """What another process does in the directory."""
    found = find_start(run, resume="auto", overwrite=False)
    with run_directory(run, found, overwrite=False, keep_last=9):
        (run / "config.yaml").write_text("another")
        if step is not None:
            add(run, step)
        if result is not None:
            (run / result).mkdir()


@pytest.mark.parametrize("what", [{}, {"result": "adapter"}, {"result": "model"}, {"step": 7}])
@pytest.mark.parametrize(
    ("resume", "overwrite", "there"),
    [(None, False, False), ("auto", False, False), ("auto", False, True), (None, True, True)],
)
def test_a_directory_that_was_used_since_is_not_taken(
    tmp_path: Path, what: Any, resume: str | None, overwrite: bool, there: bool
) -> None:
    """One process looks and is slow to load; another comes and is done before it takes over."""
    run = tmp_path / "run"
    if there:
        run.mkdir()
        (run / "config.yaml").touch()
        add(run, 3)
    slow = find_start(run, resume=resume, overwrite=overwrite)
    take(run, **what)
    left = sorted(run.rglob("*"))
    with (
        pytest.raises(ConfigError, match=r"run was used by another process while this one was lo"),
        run_directory(run, slow, overwrite=overwrite, keep_last=1),
    ):
        pass
    assert sorted(run.rglob("*")) == left
    assert (run / "config.yaml").read_text() == "another"


def state_file(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        state = torch.load(folder / "train_state.pt", weights_only=True)
        changed = change(state)
        torch.save(state if changed is None else changed, folder / "train_state.pt")

    return damage


def optimizer(**changes: Any) -> Callable[[Path], Any]:
    return state_file(lambda state: state["optimizer"].update(changes))


def generator(**changes: Any) -> Callable[[Path], Any]:
    return state_file(lambda state: state["random"].update(changes))


def info(**changes: Any) -> Callable[[Path], Any]:
    text = json.dumps({"step": 2, "note": "x"} | changes)
    return lambda folder: (folder / "train_state.json").write_text(text)


def raw(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


GROUPS = [{"params": [0], "lr": 1.0}]
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (raw("train_state.pt", b""), r"train_state.pt: cannot be read \("),
    "no zip": (raw("train_state.pt", b"x" * 99), r"train_state.pt: cannot be read \("),
    "a pickle": (raw("train_state.pt", pickle.dumps({})), r"train_state.pt: cannot be read \("),
    "missing": (lambda f: (f / "train_state.pt").unlink(), "train_state.pt: cannot be read"),
    "a list": (state_file(lambda s: [s]), "train_state.pt: it is list, not dict"),
    "no optimizer": (state_file(lambda s: s.pop("optimizer") and None), "optimizer is missing"),
    "no random": (state_file(lambda s: {"optimizer": s["optimizer"]}), "random is missing"),
    "groups": (optimizer(param_groups={}), r"optimizer\['param_groups'\] is dict, not list"),
    "params": (optimizer(param_groups=[{"params": ["a"]}]), "holds what is no int"),
    "numbers": (optimizer(param_groups=[{"params": [1]}]), "does not number its parameters from 0"),
    "stranger": (optimizer(state={5: {}}), r"optimizer\['state'\]\[5\] is of no parameter"),
    "flat state": (
        optimizer(state={0: 1}, param_groups=GROUPS),
        r"optimizer\['state'\]\[0\] is int, not dict",
    ),
    **{
        f"step {value}": (
            optimizer(state={0: {"step": value}}, param_groups=GROUPS),
            r"optimizer\['state'\]\[0\]\['step'\] is no number of steps",
        )
        for value in (math.nan, -1, "x", torch.tensor(math.inf), torch.zeros(2))
    },
    "python": (generator(python=(3, (1,), None)), "'python'"),
    "numpy": (generator(numpy=(1, 2)), "'numpy'"),
    "numpy far off": (
        state_file(lambda s: s["random"].update(numpy=(*s["random"]["numpy"][:2], 10**9, 0, 0.0))),
        "'numpy'",
    ),
    "cpu": (generator(cpu=torch.zeros(3)), "'cpu'"),
    "cuda": (generator(cuda=3), "'cuda'"),
    "info no object": (raw("train_state.json", b"[]"), "train_state.json: holds list"),
    "info nested": (raw("train_state.json", b"[" * 10**5), "nested too deeply"),
    "info NaN": (raw("train_state.json", b'{"step": NaN}'), "NaN is not a number"),
    **{
        f"info step {value!r}": (info(step=value), r"train_state.json: step is .*; expected a wh")
        for value in (-2, 0, 2.0, "2", None, True, [2])
    },
    "another step": (info(step=3), "step is 3, but the folder is step_2"),
    "a huge step": (info(step=10**30), "but the folder is step_2"),
    "what the recipe refuses": (info(note="bad"), "train_state.json: bad note"),
}


def refuse_bad(about: dict[str, Any]) -> None:
    if about["note"] == "bad":
        raise ValueError("bad note")


ABOUT: dict[str, Any] = {"step": 9, "total_steps": 9, "config": {}, "compile": "off"}
# what a run says about itself, in all of which it is believed, but for:
UNTRUE: dict[str, tuple[Any, str]] = {
    "config": (None, "config is None; expected dict"),
    "total_steps": ("3", "total_steps is '3'; expected int"),
    "step": (10, "step is 10 of a run of 9"),
    "compile": ("maybe", "compile is 'maybe'; expected on or off"),
    "date": ("yesterday", "date is 'yesterday'; expected one such as 2026-12-01T12:00"),
    "base": ({"content": 3}, "base is {'content': 3}; expected content and config"),
}


@pytest.mark.parametrize("key", UNTRUE)
def test_what_a_checkpoint_says_is_checked(key: str) -> None:
    setup._check_about(ABOUT)
    value, message = UNTRUE[key]
    with pytest.raises(ValueError, match=re.escape(message)):
        setup._check_about(ABOUT | {key: value})


@pytest.mark.parametrize("name", DAMAGE)
def test_what_no_run_wrote_is_refused_or_skipped(run: Path, name: str) -> None:
    """Whatever the manifest says."""
    add(run, 1, 2)
    folder, (change, message) = step_folders(run)[-1], DAMAGE[name]
    change(folder)
    (folder / "manifest.json").unlink()
    write_manifest(folder)
    new = run.with_name("new")
    with pytest.raises(CheckpointError, match=message) as caught:
        find_start(new, resume=str(folder), overwrite=False, check_about=refuse_bad)
    assert str(folder) in str(caught.value)
    found = find_start(run, resume="auto", overwrite=False, check_about=refuse_bad)
    assert found.step == 1
    assert found.messages[0].startswith("warning: a damaged checkpoint is skipped: ")


def test_what_is_no_folder_is_refused_or_skipped(run: Path, tmp_path: Path) -> None:
    add(run, 1, 2, 3)
    shutil.move(run / "checkpoints" / "step_3", tmp_path / "elsewhere")
    link, file, loop = (run / "checkpoints" / f"step_{n}" for n in (3, 4, 5))
    link.symlink_to(tmp_path / "elsewhere")
    file.touch()
    loop.symlink_to(loop)
    for path, message in ((link, "symbolic link"), (loop, "symbolic link"), (file, "is a file")):
        with pytest.raises(CheckpointError, match=message):
            start(run.with_name("new"), str(path))
    found = start(run)
    assert found.step == 2
    with run_directory(run, found, overwrite=False, keep_last=1):
        left = ["step_2", "step_3.damaged", "step_4.damaged", "step_5.damaged"]
        assert names(run) == left
    assert (tmp_path / "elsewhere").is_dir()


def test_only_the_last_are_kept(run: Path) -> None:
    add(run, 9, 10, 11)
    remove_old_steps(run, 2)
    assert names(run) == ["step_10", "step_11"]
    with run_directory(run, start(run), overwrite=False, keep_last=1):  # killed before it did that
        assert names(run) == ["step_11"]
