"""`--multirun`: one job after another, each in a process of its own, and a table of all of them.

A job's memory and its mistakes end with its process. What all came to is in sweep.json and
sweep.csv in the folder of the sweep, written after each of them.
"""

from __future__ import annotations

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path
from types import FrameType
from typing import Any

from rich.table import Table

from qlora_builders.config.entry import parse_options
from qlora_builders.config.instantiate import allow_prefixes
from qlora_builders.config.overrides import key_of
from qlora_builders.config.sweep import Job, differences, plan_sweep, short_names
from qlora_builders.config.verbs import VERBS
from qlora_builders.console import StopRequest, plain_table, table_console
from qlora_builders.errors import ConfigError
from qlora_builders.files.outputs import write_whole
from qlora_builders.files.reading import read_json
from qlora_builders.report import AVERAGED, Run, final_figures, read_run
from qlora_builders.visible import say

RESULTS_FILE = "sweep.json"
FINISHED = "finished"
_KEPT = 2**14  # bytes of stderr to find the error in
_LARGEST = 1e300  # beyond it an integer is no float
_WIDEST = 24  # of a swept value, characters
# figure -> head of its column, and how a value is written
_COLUMNS = {
    "loss": ("train loss", "{:.4f}"),
    "eval_loss": ("eval loss", "{:.4f}"),
    "best_eval_loss": ("lowest", "{:.4f}"),
    "perplexity": ("perplexity", "{:.4f}"),
    "kl": ("KL", "{:.2e}"),
    "bits": ("bits", "{:.3f}"),
    "exact_match": ("exact match", "{:.1%}"),
    "tokens_per_s": ("tokens/s", "{:,.0f}"),
    "peak_memory_mib": ("peak MiB", "{:,.0f}"),
}


@dataclass
class Result:
    """A job as it stands.

    Attributes:
        swept: the overrides that set it apart.
        path: its folder, or the file that it writes.
        command: what follows `qlora` to run it alone.
        seconds: over all processes that worked on it.
        figures: by the keys of `_COLUMNS`.
    """

    name: str
    swept: dict[str, str]
    path: str
    command: list[str]
    status: str = "not started"
    seconds: float = 0.0
    error: str = ""
    figures: dict[str, float] = field(default_factory=dict)


def sweep(verb: str, words: Sequence[str], launch: Sequence[str] = ()) -> int:
    """Run all jobs of a command line; returns the exit code: 0 only if every job finished.

    Args:
        verb: one that is swept.
        words: the command line, without --multirun.
        launch: options that start every job in several processes.

    Raises:
        ConfigError: before anything runs, with everything that is wrong in any job.
    """
    if "RANK" in os.environ:
        raise ConfigError("--multirun starts its processes itself: --nproc-per-node, not torchrun")
    options, overrides = parse_options(words)
    if options.print_config:
        raise ConfigError("--print-config is for one run; leave out --multirun")
    with allow_prefixes(options.allow):
        folder, jobs = plan_sweep(verb, overrides, options.config_dir)
    own = ["--config-dir", options.config_dir] if options.config_dir else []
    own += [word for prefix in options.allow for word in ("--allow", prefix)]
    results = [
        Result(job.name, dict(job.swept), str(job.path), [verb, *launch, *own, *job.overrides])
        for job in jobs
    ]
    if getattr(jobs[0].cfg, "dry_run", False):
        print(f"nothing is wrong with the configs of these {len(jobs)} jobs:")
        for result in results:
            say(shlex.join(["qlora", *(w for w in result.command if key_of(w) != "dry_run")]))
        return 0
    _check_folder(folder, jobs[0])
    _go_on(verb, folder, jobs, results)
    runner = JobRunner()
    with runner.passing_on_signals():
        for number, result in enumerate(results, 1):
            done = result.status == FINISHED
            say(f"[{number}/{len(results)}] {result.name}{' was finished before' if done else ''}")
            if not done:
                write_results(folder, verb, results)
                runner.run(verb, result)
            write_results(folder, verb, results)
            if runner.stop:
                break
    return _conclude(verb, folder, results, runner.stop)


def _check_folder(folder: Path, job: Job) -> None:
    """A sweep starts in a folder of its own, or goes on in one of a sweep."""
    if not folder.exists() or not any(folder.iterdir()):
        return
    training = getattr(job.cfg, "training", None)
    if training is None:
        raise ConfigError(f"{folder} is not empty; name another folder with output=")
    if training.resume is None and not job.cfg.overwrite:
        raise ConfigError(
            f"output_dir={folder} is not empty; choose another, go on with its sweep by "
            "training.resume=auto, or set overwrite=true"
        )
    if not (folder / RESULTS_FILE).is_file():
        key = "overwrite=true replaces" if job.cfg.overwrite else "training.resume goes on with"
        raise ConfigError(f"output_dir={folder} holds no sweep; {key} only sweeps")


def _go_on(verb: str, folder: Path, jobs: Sequence[Job], results: Sequence[Result]) -> None:
    """Take over what earlier processes of the sweep did, where it is to go on.

    Raises:
        ConfigError: with every job that is finished, but had another config.
    """
    training = getattr(jobs[0].cfg, "training", None)
    if training is None or training.resume is None:
        return
    seconds = read_seconds(folder)
    problems = []
    for job, result in zip(jobs, results, strict=True):
        result.seconds = seconds.get(job.name, 0.0)
        run = _run_of(verb, result)
        if run is None:
            continue
        result.status = FINISHED if run.is_finished else run.status
        changed = differences(run.config, asdict(job.cfg))
        if run.is_finished and changed:
            problems.append(
                f"{job.path} is finished, with another config: {', '.join(changed)}; choose "
                "another output_dir, or set overwrite=true"
            )
    if problems:
        raise ConfigError(*problems)


def _run_of(verb: str, result: Result) -> Run | None:
    """Notes the figures of a job; returns its run, where there is one yet."""
    result.figures = figures_of(verb, Path(result.path))
    try:
        return read_run(Path(result.path)) if VERBS[verb].trains else None
    except ConfigError:
        return None


def _conclude(verb: str, folder: Path, results: Sequence[Result], stop: StopRequest) -> int:
    console = table_console()
    console.print(results_table(results))
    for result in results:
        if result.error:
            say(f"{result.name}: {result.error}", file=sys.stderr)
    console.print(f"wrote {folder / RESULTS_FILE} and .csv")
    trains = VERBS[verb].trains
    if trains:
        shown = shlex.quote(str(folder))
        console.print(f"compare: qlora report {shown}/*/ output={shown}/report.html")
    done = sum(result.status == FINISHED for result in results)
    if done == len(results):
        return 0
    missing = f"{len(results) - done} of {len(results)} jobs have not finished"
    how = "; the same command with training.resume=auto goes on" if trains else ""
    print(f"error: {missing}{how}", file=sys.stderr)
    return stop.exit_code if stop else 1


# ---- one job ------------------------------------------------------------------------------------


class JobRunner:
    """Runs one job after another; what comes as a signal goes to the one that is running.

    Attributes:
        stop: set by the first SIGINT or SIGTERM; no other job is to start then.
    """

    def __init__(self) -> None:
        self.stop = StopRequest()
        self._process: subprocess.Popen[bytes] | None = None

    @contextmanager
    def passing_on_signals(self) -> Iterator[None]:
        def pass_on(number: int, _frame: FrameType | None) -> None:
            self.stop.signal_number = self.stop.signal_number or number
            if self._process is not None:
                self._process.send_signal(number)

        numbers = (signal.SIGINT, signal.SIGTERM)
        previous = {number: signal.signal(number, pass_on) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def run(self, verb: str, result: Result) -> None:
        """Run the command of a job, and note how it ended.

        All its output is passed on. Its session is one of its own: Ctrl-C in a terminal would
        otherwise reach it twice, and the second one ends a run without a checkpoint.
        """
        started = time.monotonic()
        words = [sys.executable, "-m", "qlora_builders.cli", *result.command]
        with subprocess.Popen(words, stderr=subprocess.PIPE, start_new_session=True) as process:
            self._process = process
            if self.stop.signal_number is not None:  # it came while there was no one to tell
                process.send_signal(self.stop.signal_number)
            assert process.stderr is not None
            tail = b""
            while chunk := os.read(process.stderr.fileno(), 2**16):
                sys.stderr.buffer.write(chunk)
                sys.stderr.flush()
                tail = (tail + chunk)[-_KEPT:]
            code = process.wait()
            self._process = None
        result.seconds += time.monotonic() - started
        result.error = error_in(tail.decode(errors="replace"), code)
        run = _run_of(verb, result)
        finished = run.is_finished if run is not None else not VERBS[verb].trains
        if code == 0 and finished:
            result.status = FINISHED
        elif self.stop or code in (0, 128 + signal.SIGINT):
            result.status = run.status if run is not None else "stopped"
        else:
            result.status = "failed"


def error_in(stderr: str, code: int) -> str:
    """What a job said of its end: its lines with `error:`, else the last one of a traceback."""
    if code in (0, 128 + signal.SIGINT):
        return ""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if errors:
        return "; ".join(errors)
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return lines[-1] if lines else f"exit code {code}"


# ---- what all came to ---------------------------------------------------------------------------


def figures_of(verb: str, path: Path) -> dict[str, float]:
    """What can be read of a job, however far it came."""
    try:
        if VERBS[verb].trains:
            found: dict[str, Any] = final_figures(read_run(path))
        else:
            content = read_json(path.with_suffix(".json"))
            if verb == "plan":
                content = {row["plan"]: row for row in content["comparison"]}[content["written"]]
            found = {**content, "eval_loss": content.get("loss"), "loss": None}
    except (ConfigError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return {
        key: found[key]
        for key in _COLUMNS
        if isinstance(found.get(key), int | float) and not abs(found[key]) > _LARGEST
    }


def write_results(folder: Path, verb: str, results: Sequence[Result]) -> None:
    """Both files, each in one step."""
    ordered = ranked(results)
    text = json.dumps({"verb": verb, "jobs": [asdict(r) for r in ordered]}, indent=2)
    rows = [
        {**r.swept, **{key: r.figures.get(key) for key in _COLUMNS}}
        | {"seconds": round(r.seconds, 1), "status": r.status, "path": r.path, "error": r.error}
        for r in ordered
    ]
    table = StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    for name, content in ((RESULTS_FILE, text + "\n"), ("sweep.csv", table.getvalue())):
        write_whole(folder / name, content.encode())


def read_seconds(folder: Path) -> dict[str, float]:
    """Of each job that earlier processes of the sweep worked on.

    Raises:
        ConfigError: if the file is not one of ours.
    """
    file = folder / RESULTS_FILE
    try:
        found = {job["name"]: job["seconds"] for job in read_json(file)["jobs"]}
        if not all(type(k) is str and type(v) in (int, float) for k, v in found.items()):
            raise ValueError("a job's name is a string, and its seconds are a number")
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}; choose another output_dir") from error
    return found


def ranked(results: Sequence[Result]) -> list[Result]:
    """The lowest last eval loss first, or train loss where there is none; then the unfinished."""

    def rank(result: Result) -> tuple[bool, bool, float]:
        losses = [result.figures[key] for key in ("eval_loss", "loss") if key in result.figures]
        return result.status != FINISHED, not losses, losses[0] if losses else 0.0

    return sorted(results, key=rank)


def results_table(results: Sequence[Result]) -> Table:
    """One row for each job; a column for each figure that any job has."""
    shown = [key for key in _COLUMNS if any(key in r.figures for r in results)]
    if all(r.figures.get("best_eval_loss") == r.figures.get("eval_loss") for r in results):
        shown = [key for key in shown if key != "best_eval_loss"]
    labels = short_names(results[0].swept)
    caption = f"train loss: the mean of the last {AVERAGED}" if "loss" in shown else None
    heads = [*(_COLUMNS[key][0] for key in shown), "time"]
    table = plain_table([*labels.values()], heads, caption=caption)
    table.add_column("status")
    for result in ranked(results):
        figures = result.figures
        cells = [_COLUMNS[k][1].format(figures[k]) if k in figures else "–" for k in shown]
        minutes, seconds = divmod(round(result.seconds), 60)
        time = f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
        table.add_row(*(_end_of(result.swept[key]) for key in labels), *cells, time, result.status)
    return table


def _end_of(value: str) -> str:
    """What tells paths apart, as the table has no room for more; sweep.csv has all of it."""
    return value if len(value) <= _WIDEST else "…" + value[1 - _WIDEST :]
