"""What the jobs of a sweep came to: sweep.json and sweep.csv in its folder, and a table."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from qlora_builders.config.sweep import short_names
from qlora_builders.config.verbs import VERBS
from qlora_builders.errors import ConfigError
from qlora_builders.files.outputs import write_whole
from qlora_builders.files.reading import read_json
from qlora_builders.report import AVERAGED, final_figures, read_run

RESULTS_FILE = "sweep.json"
FINISHED = "finished"
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


def figures_of(verb: str, path: Path) -> dict[str, float]:
    """What can be read of a job, however far it came."""
    try:
        if VERBS[verb].trains:
            return _known(final_figures(read_run(path)))
        content = read_json(path.with_suffix(".json"))
        if verb == "plan":
            plans = {row["plan"]: row for row in content["comparison"]}
            content = plans[content["written"]]
        return _known({**content, "eval_loss": content.get("loss"), "loss": None})
    except (ConfigError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _known(figures: Mapping[str, Any]) -> dict[str, float]:
    found = {key: figures.get(key) for key in _COLUMNS}
    return {
        key: value
        for key, value in found.items()
        if isinstance(value, int | float) and not abs(value) > _LARGEST
    }


def write_results(folder: Path, verb: str, results: Sequence[Result]) -> None:
    """Both files, each in one step."""
    ordered = ranked(results)
    text = json.dumps({"verb": verb, "jobs": [asdict(r) for r in ordered]}, indent=2)
    table = StringIO()
    rows = [_flat(result) for result in ordered]
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    for name, content in ((RESULTS_FILE, text + "\n"), ("sweep.csv", table.getvalue())):
        write_whole(folder / name, content.encode())


def read_results(folder: Path) -> list[Result]:
    """Those that an earlier process of the sweep has written; none if there was none.

    Raises:
        ConfigError: if the file is not one of ours.
    """
    file = folder / RESULTS_FILE
    if not file.exists():
        return []
    try:
        results = [Result(**job) for job in read_json(file)["jobs"]]
        for result in results:
            if type(result.name) is not str or type(result.seconds) not in (int, float):
                raise ValueError("a job's name is a string, and its seconds are a number")
        return results
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}; choose another output_dir") from error


def ranked(results: Sequence[Result]) -> list[Result]:
    """The lowest last eval loss first, or train loss where there is none; then the unfinished."""

    def rank(result: Result) -> tuple[bool, bool, float]:
        losses = [result.figures.get(key) for key in ("eval_loss", "loss")]
        loss = next((value for value in losses if value is not None), None)
        return result.status != FINISHED, loss is None, loss or 0.0

    return sorted(results, key=rank)


def results_table(results: Sequence[Result]) -> Table:
    """One row for each job; a column for each figure that any job has."""
    shown = [key for key in _COLUMNS if any(r.figures.get(key) is not None for r in results)]
    if all(r.figures.get("best_eval_loss") == r.figures.get("eval_loss") for r in results):
        shown = [key for key in shown if key != "best_eval_loss"]
    labels = short_names(results[0].swept)
    caption = f"train loss: the mean of the last {AVERAGED}" if "loss" in shown else None
    table = Table(box=SIMPLE_HEAD, pad_edge=False, caption=caption)
    for label in labels.values():
        table.add_column(label, no_wrap=True)
    for key in shown:
        table.add_column(_COLUMNS[key][0], justify="right", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("status")
    for result in ranked(results):
        values = [result.figures.get(key) for key in shown]
        cells = [
            "–" if value is None else _COLUMNS[key][1].format(value)
            for key, value in zip(shown, values, strict=True)
        ]
        swept = [_end_of(result.swept[key]) for key in labels]
        table.add_row(*swept, *cells, _duration(result.seconds), result.status)
    return table


def _flat(result: Result) -> dict[str, Any]:
    figures = {key: result.figures.get(key) for key in _COLUMNS}
    seconds = round(result.seconds, 1)
    ends = {"seconds": seconds, "status": result.status, "path": result.path, "error": result.error}
    return {**result.swept, **figures, **ends}


def _end_of(value: str) -> str:
    """What tells paths apart, as the table has no room for more; sweep.csv has all of it."""
    return value if len(value) <= _WIDEST else "…" + value[1 - _WIDEST :]


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}"
