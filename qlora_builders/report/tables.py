"""The tables of a page: final figures, samples, config and environment, one column per run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any
from xml.etree.ElementTree import Element

from qlora_builders.config.compose import compose_tree, to_config
from qlora_builders.config.resume import flatten
from qlora_builders.data import spell_asked
from qlora_builders.report.figures import AVERAGED, final_figures
from qlora_builders.report.html import element, fold, table
from qlora_builders.report.run import Run, spell_value
from qlora_builders.report.series import spell

_MOST_SAMPLES = 12
_NOTHING = "–"
# where and how, not what; and what the other keys of `method` say already
_NO_SETTING = ("output_dir", "overwrite", "training.resume", "method.components")
_NOT_SHOWN = ("directory", "first_step", "total_steps", "skipped_rows")


def result_section(runs: Sequence[Run]) -> Element:
    figures = [_final_figures(run) for run in runs]
    rows = [[key, *(column[key] for column in figures)] for key in figures[0]]
    head = ["figure", *(run.name for run in runs)]
    return element("section", element("h2", "Result"), table(head, rows, caption="Final figures"))


def _final_figures(run: Run) -> dict[str, str]:
    def shown(value: float | None) -> str:
        return _NOTHING if value is None else spell(value)

    final = final_figures(run)
    last, best, at = final.eval_loss, final.best_eval_loss, final.best_eval_step
    return {
        "state": run.status,
        f"loss, mean of the last {AVERAGED}": shown(final.loss),
        "evaluation loss, last": shown(last),
        "evaluation loss, lowest": _NOTHING if best is None else f"{spell(best)} at step {at:,}",
        "perplexity, last": _NOTHING
        if run.compares_pairs or last is None
        else spell(math.exp(min(last, 600))),
        "tokens/s, median": shown(final.tokens_per_s),
        "seconds per step, median": shown(final.step_s),
        "peak memory, MiB": shown(final.peak_memory_mib),
    }


def sample_section(runs: Sequence[Run]) -> Element | None:
    """Answers of the first and the last time that the run wrote some."""
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
    keys = list(dict.fromkeys(key for column in columns for key in column))
    if not keys:
        return None
    rows = [[*key, *(column.get(key, _NOTHING) for column in columns)] for key in keys]
    shown = table(
        head, rows[:_MOST_SAMPLES], caption=f"{min(len(rows), _MOST_SAMPLES)} answers", text=True
    )
    return element("section", element("h2", "Samples"), shown)


def config_section(runs: Sequence[Run]) -> Element:
    """What was chosen, beside the default that it replaces; then everything."""
    verb = "dpo" if any(run.compares_pairs for run in runs) else "finetune"
    defaults = flatten(asdict(to_config(compose_tree(verb))))
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    chosen = [
        key
        for key in keys
        if key not in _NO_SETTING
        and any(run.config.get(key) != defaults.get(key) for run in runs if run.config)
    ]
    names = [run.name for run in runs]

    def row(key: str) -> list[str]:
        return [key, *(_spelled(run.config, key) for run in runs)]

    content = [
        table(
            ["key", *names, "default"],
            [[*row(key), _spelled(defaults, key)] for key in chosen],
            caption="What differs from the defaults",
            text=True,
        )
        if chosen
        else element("p", "Every key has its default." if keys else "There is no config.yaml.")
    ]
    if keys:
        everything = table(
            ["key", *names], map(row, keys), caption="The whole config.yaml", text=True
        )
        content.append(fold(f"All {len(keys)} keys", everything))
    return element("section", element("h2", "Config"), *content)


def environment_section(runs: Sequence[Run]) -> Element | None:
    if not any(run.processes for run in runs):
        return None
    columns = [dict(_environment(run)) for run in runs]
    keys = list(dict.fromkeys(key for column in columns for key in column))
    rows = [[key, *(column.get(key, _NOTHING) for column in columns)] for key in keys]
    shown = table(["", *(run.name for run in runs)], rows, caption="Environment", text=True)
    return element("section", element("h2", "Environment"), fold("Versions and device", shown))


def _environment(run: Run) -> Iterator[tuple[str, str]]:
    """Of the last process; how many there were."""
    if not run.processes:
        return
    for key, value in run.processes[-1].items():
        if key not in _NOT_SHOWN and value is not None:
            yield key, spell_value(value)
    resumed = run.resumed_at()
    if resumed:
        yield "resumed", f"after steps {', '.join(f'{step:,}' for step in resumed)}"


def _spelled(config: Mapping[str, Any], key: str) -> str:
    return spell_value(config[key]) if key in config else _NOTHING
