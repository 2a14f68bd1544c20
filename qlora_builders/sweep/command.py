"""The command line of a sweep: `qlora VERB --multirun KEY=VALUE,VALUE ...`."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from qlora_builders.config.entry import parse_options
from qlora_builders.config.instantiate import allow_prefixes
from qlora_builders.config.overrides import key_of
from qlora_builders.config.sweep import Job, differences, plan_sweep
from qlora_builders.config.verbs import VERBS
from qlora_builders.console import StopRequest, table_console
from qlora_builders.errors import ConfigError
from qlora_builders.report import Run, read_run
from qlora_builders.sweep.process import JobRunner
from qlora_builders.sweep.results import (
    FINISHED,
    RESULTS_FILE,
    Result,
    figures_of,
    read_results,
    results_table,
    write_results,
)
from qlora_builders.visible import say


def sweep(verb: str, words: Sequence[str], launch: Sequence[str] = ()) -> int:
    """Run all jobs of a command line; returns the exit code: 0 only if every job finished.

    Args:
        verb: one that is `swept`.
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
        _run_all(verb, folder, results, runner)
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
    earlier = {result.name: result for result in read_results(folder)}
    problems = []
    for job, result in zip(jobs, results, strict=True):
        if job.name in earlier:
            result.seconds = earlier[job.name].seconds
        run = _run_of(job.path)
        if run is None:
            continue
        result.status = FINISHED if run.is_finished else run.status
        result.figures = figures_of(verb, job.path)
        changed = differences(run.config, asdict(job.cfg))
        if run.is_finished and changed:
            problems.append(
                f"{job.path} is finished, with another config: {', '.join(changed)}; choose "
                "another output_dir, or set overwrite=true"
            )
    if problems:
        raise ConfigError(*problems)


def _run_of(path: Path) -> Run | None:
    try:
        return read_run(path)
    except ConfigError:  # nothing there yet
        return None


def _run_all(verb: str, folder: Path, results: Sequence[Result], runner: JobRunner) -> None:
    for number, result in enumerate(results, 1):
        done = result.status == FINISHED
        note = " was finished before" if done else ""
        say(f"[{number}/{len(results)}] {result.name}{note}")
        if not done:
            write_results(folder, verb, results)
            code, seconds, result.error = runner.run(result.command)
            result.seconds += seconds
            result.status = _status(verb, Path(result.path), code, bool(runner.stop))
            result.figures = figures_of(verb, Path(result.path))
        write_results(folder, verb, results)
        if runner.stop:
            return


def _status(verb: str, path: Path, code: int, stopped: bool) -> str:
    """`finished`, `failed`, or after which step it was stopped."""
    trains = VERBS[verb].trains
    run = _run_of(path) if trains else None
    if code == 0 and (not trains or (run is not None and run.is_finished)):
        return FINISHED
    if stopped or code in (0, 130):
        return run.status if run is not None else "stopped"
    return "failed"


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
