"""The page: what stands in it; `page.html.j2` says where and how.

A run directory may be a stranger's. Every text comes into the page through `_shown` and is escaped
by the template; only drawings, which hold no word of a run, and what the template's own macros
made go in as they are. Should something slip through all the same, the page's content security
policy runs no script and fetches nothing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from qlora_builders import __version__
from qlora_builders.config.checks import flatten
from qlora_builders.config.compose import compose_tree, to_config
from qlora_builders.config.sections import knobs
from qlora_builders.config.verbs import VERBS
from qlora_builders.data import spell_asked
from qlora_builders.files.outputs import check_writable, write_whole
from qlora_builders.report.charts import NUM_COLORS, layer_charts, spell, step_charts
from qlora_builders.report.run import AVERAGED, Run, final_figures, layer_figures

Table = tuple[list[str], list[list[str]]]  # head and rows

LONGEST_TEXT = 4000  # characters of one value
_MOST_SAMPLES = 12
_MOST_NOTES = 20  # of a run
# where and how, not what
_NO_SETTING = ("output_dir", "overwrite", "training.resume")
_NOT_SHOWN = ("directory", "first_step", "total_steps", "skipped_rows")
# what HTML allows in no form, even escaped: control characters, halves of pairs, no characters
_NOT_IN_HTML = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)


def write_report(runs: Sequence[Run], output: Path) -> Path:
    """Write the page, in one step: a half-written file never has the final name.

    Raises:
        QLoRAError: if it cannot be written there.
    """
    check_writable(output, "output")
    write_whole(output, report_page(runs).encode())
    return output


def report_page(runs: Sequence[Run]) -> str:
    """The whole page; text of a stranger's run in it is text, whatever it says."""
    import jinja2  # where pages are made only, like matplotlib
    from markupsafe import Markup

    def shown(value: object) -> object:
        return value if isinstance(value, Markup) else _shown(str(value))

    page = jinja2.Environment(
        autoescape=True,
        finalize=shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters["drawing"] = Markup
    source = Path(__file__).with_name("page.html.j2").read_text("utf-8")
    return page.from_string(source).render(_content(_with_distinct_names(runs)))


def _shown(text: str) -> str:
    """Any text as a page can hold it."""
    if len(text) > LONGEST_TEXT:
        text = f"{text[:LONGEST_TEXT]} ... ({len(text) - LONGEST_TEXT:,} more characters)"
    return _NOT_IN_HTML.sub("\ufffd", text)


def _content(runs: Sequence[Run]) -> dict[str, Any]:
    """By the names that the template has for it."""

    def named(run: Run, text: str) -> str:
        return text if len(runs) == 1 else f"{run.name}: {text}"

    layers = [layer_figures(run) for run in runs]
    charts, other_charts = step_charts(runs)
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    return {
        "title": runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        "states": [(re.split(r"\W", run.status)[0], named(run, run.status)) for run in runs],
        "notes": [named(run, note) for run in runs for note in _notes(run)],
        "results": _beside(runs, [_final_figures(run) for run in runs], "figure"),
        "charts": charts,
        "other_charts": other_charts,
        "resumed": [f"{run.name} resumed {_resumed(run)}" for run in runs if run.resumed_at()],
        "layer_charts": list(layer_charts(runs, layers)),
        "layer_notes": [
            named(run, note)
            for run, figures in zip(runs, layers, strict=True)
            for note in figures.notes
        ],
        "num_colors": NUM_COLORS,
        "samples": _samples(runs),
        "chosen": _chosen(runs, keys),
        "config": _beside(runs, [run.config for run in runs], "key", keys),
        "environment": _beside(runs, [_environment(run) for run in runs]),
        "made": f"qlora-builders {__version__}, {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
    }


def _with_distinct_names(runs: Sequence[Run]) -> list[Run]:
    """Directory names, with as many folders before them as it takes to tell them apart."""
    parts = [run.path.resolve().parts for run in runs]
    depth = 1
    while len({p[-depth:] for p in parts}) < len(set(parts)):
        depth += 1
    return [replace(run, name="/".join(p[-depth:])) for run, p in zip(runs, parts, strict=True)]


def _resumed(run: Run) -> str:
    return f"after {', '.join(f'step {step:,}' for step in run.resumed_at())}"


def _notes(run: Run) -> list[str]:
    notes = [*run.notes, *run.skipped_rows]
    for key, (steps, values) in run.metrics.items():
        bad = [step for step, value in zip(steps, values, strict=True) if not math.isfinite(value)]
        if bad:
            notes.append(
                f"{key} is not finite at {len(bad):,} of {len(steps):,} steps, the first of them "
                f"{bad[0]:,}"
            )
    return notes[:_MOST_NOTES]


# ---- tables: one column per run --------------------------------------------------------------


def _beside(
    runs: Sequence[Run],
    columns: Sequence[Mapping[str, Any]],
    what: str = "",
    keys: Sequence[str] | None = None,
) -> Table:
    """
    Args:
        columns: of each run, and then the defaults if there is one more.
        keys: of the rows; None: all that a column has.
    """
    if keys is None:
        keys = list(dict.fromkeys(key for column in columns for key in column))
    head = [what, *(run.name for run in runs), "default"][: len(columns) + 1]
    rows = [
        [key, *(_spelled(each[key]) if key in each else "–" for each in columns)] for key in keys
    ]
    return head, rows


def _spelled(value: Any) -> str:
    """A config value as its YAML would have it."""
    if value is None or isinstance(value, bool | list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def _final_figures(run: Run) -> dict[str, str]:
    final = final_figures(run)
    names = {
        "loss": f"loss, mean of the last {AVERAGED}",
        "eval_loss": "evaluation loss, last",
        "best_eval_loss": "evaluation loss, lowest",
        "perplexity": "perplexity, last",
        "tokens_per_s": "tokens/s, median",
        "step_s": "seconds per step, median",
        "peak_memory_mib": "peak memory, MiB",
    }
    if "eval_loss" in final and not run.compares_pairs:
        final["perplexity"] = math.exp(min(final["eval_loss"], 600))
    shown = {key: spell(value) for key, value in final.items()}
    if "best_eval_loss" in final:
        shown["best_eval_loss"] += f" at step {final['best_eval_step']:,}"
    return {"state": run.status, **{name: shown.get(key, "–") for key, name in names.items()}}


def _samples(runs: Sequence[Run]) -> Table:
    """Answers of the first and the last time that a run wrote some."""
    head = ["prompt", "reference"]
    columns: list[dict[tuple[str, str], str]] = []
    for run in runs:
        by_step: dict[int, dict[tuple[str, str], str]] = {}
        for row in run.samples:
            if isinstance(row.get("step"), int):
                key = spell_asked(row), str(row.get("reference", ""))
                by_step.setdefault(row["step"], {})[key] = str(row.get("answer", ""))
        for step in sorted({min(by_step), max(by_step)}) if by_step else ():
            if step == 0 and by_step[step] in columns:
                continue  # another run has the same base
            columns.append(by_step[step])
            of = "" if len(runs) == 1 else f"{run.name}, "
            head.append(f"{of}{f'after step {step:,}' if step else 'before'}")
    keys = list(dict.fromkeys(key for column in columns for key in column))[:_MOST_SAMPLES]
    return head, [[*key, *(column.get(key, "–") for column in columns)] for key in keys]


def _chosen(runs: Sequence[Run], keys: Sequence[str]) -> Table:
    """What was chosen, beside the default of the verb whose keys these are."""
    training = [row for row in VERBS.values() if row.trains]
    verb = min(training, key=lambda row: len(set(keys) - knobs(row.root).keys())).name
    defaults = flatten(asdict(to_config(compose_tree(verb))))
    chosen = [
        key
        for key in keys
        if key not in _NO_SETTING
        and any(run.config and run.config.get(key) != defaults.get(key) for run in runs)
    ]
    return _beside(runs, [*(run.config for run in runs), defaults], "key", chosen)


def _environment(run: Run) -> dict[str, Any]:
    """Of the last process; and how many there were."""
    about = dict(run.last_process) | ({"resumed": _resumed(run)} if run.resumed_at() else {})
    return {k: value for k, value in about.items() if value is not None and k not in _NOT_SHOWN}
