"""The page: which part comes where."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from qlora_builders import __version__
from qlora_builders.outputs import check_writable, write_whole
from qlora_builders.report.curves import layer_section, step_section
from qlora_builders.report.html import document, element
from qlora_builders.report.layers import layer_figures
from qlora_builders.report.run import Run
from qlora_builders.report.tables import (
    config_section,
    environment_section,
    result_section,
    sample_section,
)


def write_report(runs: Sequence[Run], output: Path) -> Path:
    """Write the page, in one step: a half-written file never has the final name.

    Raises:
        QLoRAError: if it cannot be written there.
    """
    check_writable(output, "output")
    write_whole(output, report_page(runs).encode("utf-8", "replace"))
    return output


def report_page(runs: Sequence[Run]) -> str:
    """The whole page; text of a stranger's run in it is text, whatever it says."""
    runs = _with_distinct_names(runs)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    notes = [_named(run, note, runs) for run in runs for note in _notes(run)]
    layers = [layer_figures(run) for run in runs]
    states = [
        element("li", _named(run, run.status, runs), class_=run.status.replace(",", " ").split()[0])
        for run in runs
    ]
    now = datetime.now().astimezone()
    return document(
        f"{title} · qlora report",
        element(
            "header",
            element("h1", title),
            element("ul", *states, class_="states"),
            *(element("p", note, class_="note") for note in notes),
        ),
        result_section(runs),
        step_section(runs),
        layer_section(runs, layers),
        sample_section(runs),
        config_section(runs),
        environment_section(runs),
        element("footer", f"qlora-builders {__version__}, {now:%Y-%m-%d %H:%M %Z}"),
    )


def _with_distinct_names(runs: Sequence[Run]) -> list[Run]:
    """Directory names, with as many folders before them as it takes to tell them apart."""
    parts = [run.path.resolve().parts for run in runs]
    depth = 1
    while len({p[-depth:] for p in parts}) < len(set(parts)):
        depth += 1
    return [replace(run, name="/".join(p[-depth:])) for run, p in zip(runs, parts, strict=True)]


def _named(run: Run, text: str, runs: Sequence[Run]) -> str:
    return text if len(runs) == 1 else f"{run.name}: {text}"


def _notes(run: Run) -> list[str]:
    return [*run.notes, *run.skipped_rows, *_not_finite(run)]


def _not_finite(run: Run) -> Iterator[str]:
    for key, (steps, values) in run.metrics.items():
        bad = [step for step, value in zip(steps, values, strict=True) if not math.isfinite(value)]
        if bad:
            yield (
                f"{key} is not finite at {len(bad):,} of {len(steps):,} steps, the first of them "
                f"{bad[0]:,}"
            )
