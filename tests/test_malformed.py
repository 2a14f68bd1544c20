"""Whatever is wrong with what a user gives: a message that helps, exit code 2, nothing written."""

from __future__ import annotations

import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from malformed_cases import FT, TABLE, TRAIN, Case
from malformed_files import ADAPTERS, CHECKPOINTS, GOOD, LINES, write_files
from markupsafe import escape

from qlora_builders import cli
from qlora_builders.training.loggers import read_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("malformed")
    write_files(path)
    return path


@pytest.fixture(autouse=True)
def nothing_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Not one new file, and none with other content, in the whole working directory."""

    def state() -> list[tuple[Path, int, int]]:
        return [(p, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*"))]

    monkeypatch.chdir(folder)
    before = state()
    yield
    after = state()
    for path in {path for path, *_ in after} - {path for path, *_ in before}:  # for other tests
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    assert after == before


def check(code: int, errors: str, pieces: Sequence[str]) -> None:
    lines = errors.splitlines()
    assert code == 2, errors
    assert lines
    assert all(line.startswith("error: ") for line in lines), errors
    assert all(len(line) < 2100 for line in lines)
    for piece in pieces:
        assert piece in errors, errors


def test_the_table_is_long_and_uses_every_file() -> None:
    assert len(TABLE) >= 70
    commands = [command.replace("=", " ").split() for command, *_ in TABLE.values()]
    words = {word.removesuffix(".jsonl") for command in commands for word in command}
    assert CHECKPOINTS.keys() | ADAPTERS.keys() | LINES.keys() <= words


@pytest.mark.parametrize("name", TABLE)
def test_malformed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command, *pieces = TABLE[name]
    code = cli.main(shlex.split(command))
    check(code, capsys.readouterr().err, pieces)


def test_a_hub_that_does_not_answer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    code = cli.main(shlex.split(f"{TRAIN} data.train=owner/name"))
    pieces = ("cannot load 'owner/name'", "and there is no such local file: no route to host")
    check(code, capsys.readouterr().err, pieces)


# ---- disks --------------------------------------------------------------------------------------

# largest file that the disk takes, command, message
NO_SPACE: dict[str, tuple[int, str, str]] = {
    "finetune": (9, f"{FT} output_dir=out", "out/config.yaml: cannot be written: File too large"),
    "adapter": (
        2048,
        f"{FT} output_dir=out training.max_steps=1",
        "/out/adapter: cannot be written: File too large",
    ),
    "quantize": (
        2048,
        "quantize checkpoint.dir=tiny output_dir=out",
        "/out: cannot be written: File too large",
    ),
    "merge": (
        2048,
        "merge adapter.path=adapter checkpoint.dir=tiny output_dir=out",
        "/out: cannot be written: File too large",
    ),
    "report": (
        2048,
        "report run output=out.html",
        "out.html: cannot be written: File too large",
    ),
    "evaluate": (
        9,
        "evaluate checkpoint.dir=tiny data.eval=good.jsonl output=out.json",
        "out.json: cannot be written: File too large",
    ),
    "generate": (
        9,
        "generate checkpoint.dir=tiny prompt=hi output=out.jsonl",
        "out.jsonl: cannot be written: File too large",
    ),
    "configs cp": (
        9,
        "configs cp finetune out.yaml",
        "out.yaml: cannot be written: File too large",
    ),
}


@contextmanager
def small_disk(limit: int) -> Iterator[None]:
    """Any file that grows beyond `limit` bytes is refused by the kernel."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", NO_SPACE)
def test_no_space(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limit, command, message = NO_SPACE[name]
    with small_disk(limit):
        code = cli.main(shlex.split(command))
    check(code, capsys.readouterr().err, (message,))
    if name == "adapter":  # the run's records stay, and nothing half-written among them
        names = sorted(path.name for path in (folder / "out").iterdir())
        assert not [name for name in names if "partial" in name or name == "adapter"], names
        shutil.rmtree(folder / "out")


# Root may write everywhere. What it starts without CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH in its
# bounding set is bound by permissions like everybody.
BOUND = """
import ctypes, os, sys
failed = [ctypes.CDLL(None).prctl(24, capability, 0, 0, 0) for capability in (1, 2)]
if os.geteuid() == 0 and any(failed):
    sys.exit(77)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def check_process(command: str, pieces: Sequence[str]) -> None:
    """The command as a process of its own, which permissions bind."""
    words = ["-W", "error", "-m", "qlora_builders.cli", *shlex.split(command)]
    done = subprocess.run(
        [sys.executable, "-c", BOUND, *words],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])},
    )
    if done.returncode == 77:
        pytest.skip("root cannot give up capabilities here")
    check(done.returncode, done.stderr, pieces)


READ_ONLY: dict[str, Case] = {
    "finetune": (f"{FT} output_dir=locked/out", "output_dir=locked/out: ", "locked is not writa"),
    "configs cp": ("configs cp finetune locked/a.yaml", "locked/a.yaml", "Permission denied"),
    "rows": (f"{TRAIN} data.train=secret.jsonl", "secret.jsonl", "Permission denied"),
}


@pytest.fixture(scope="module")
def locked(folder: Path) -> Iterator[None]:
    (folder / "locked").mkdir(mode=0o555)
    (folder / "secret.jsonl").write_text(GOOD)
    (folder / "secret.jsonl").chmod(0)
    yield
    (folder / "locked").rmdir()
    (folder / "secret.jsonl").unlink()


@pytest.mark.parametrize("name", READ_ONLY)
@pytest.mark.usefixtures("locked")
def test_permissions(name: str) -> None:
    command, *pieces = READ_ONLY[name]
    check_process(command, pieces)


@pytest.mark.parametrize(
    "name", ["command: unknown key", "command: no such verb", "data: utf8.jsonl"]
)
def test_as_a_process(name: str) -> None:
    command, *pieces = TABLE[name]
    check_process(command, pieces)


# ---- rows that are skipped ----------------------------------------------------------------------


def test_skipped_rows_are_named_in_the_log_the_report_and_the_results(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join([GOOD, "{", GOOD, '{"a": 1, "a": 2}', '{"prompt": "a"}', GOOD]))
    words = ["checkpoint.dir=tiny", "data.on_error=skip", f"data.eval={rows}"]
    run_dir, result = tmp_path / "run", tmp_path / "result.json"
    training = [f"data.train={rows}", "training.max_steps=1", f"output_dir={run_dir}"]
    assert cli.main(["finetune", *words, *training]) == 0
    skipped = (
        "3 rows skipped (data.on_error=skip): line 2: not JSON: Expecting property name enclosed "
        "in double quotes, column 2; line 4: not JSON: key 'a' appears twice; line 5: no column "
        "'completion' (there are: prompt)"
    )
    log = capsys.readouterr().out
    assert log.count(f"{rows}: 3 examples, ") == log.count(f"; {skipped}") == 2
    assert str(escape(f"{rows}: {skipped}")) in (run_dir / "report.html").read_text()
    assert cli.main(["evaluate", *words, f"output={result}"]) == 0
    assert skipped in capsys.readouterr().out
    assert json.loads(result.read_text())["skipped_rows"] == 3
    kept = tmp_path / "kept.jsonl"
    kept.write_text("\n".join([GOOD] * 3))
    again = [f"data.train={kept}", "training.max_steps=1", f"output_dir={tmp_path / 'kept'}"]
    assert cli.main(["finetune", *words[:2], *again]) == 0
    runs = (run_dir, tmp_path / "kept")
    first, second = (read_rows(path / "metrics.jsonl")[:2] for path in runs)
    losses = [[row["loss"] for row in rows if "loss" in row] for rows in (first, second)]
    assert losses[0] == losses[1] != []  # the rows that are left, and nothing else
