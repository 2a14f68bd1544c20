"""Loss and perplexity on a data file, exact match of answers, and tasks of lm-evaluation-harness.

qlora evaluate [checkpoint.dir=...] [adapter.path=...] data.eval=... [exact_match=20]
qlora evaluate adapter.path=... compare=true    # beside the base, and the base in NF4
qlora evaluate lm_eval.tasks=[my_task] lm_eval.tasks_dir=... data.eval=null
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from qlora_builders.analysis.preflight import check_positions
from qlora_builders.checkpoint import load_with_adapter, read_adapter, read_arch
from qlora_builders.config.entry import run_recipe
from qlora_builders.config.schema import EvaluateConfig
from qlora_builders.console import table_console
from qlora_builders.data import Batches, Tokenizer, check_token_range, spell_asked
from qlora_builders.errors import counted
from qlora_builders.evaluation import (
    Candidate,
    Figure,
    Tasks,
    comparison_table,
    differences,
    figure_table,
    find_candidates,
    find_tasks,
    measure_answers,
    measure_rows,
)
from qlora_builders.files.outputs import check_new, write_whole
from qlora_builders.modules import CausalLM
from qlora_builders.runs import read_dataset
from qlora_builders.training.device import resolve_compute_dtype, resolve_device, resolve_dtype
from qlora_builders.visible import visible_json


def main(cfg: EvaluateConfig) -> None:
    if cfg.output is not None:
        check_new(Path(cfg.output), "output")
    device = resolve_device(cfg.device)
    console = table_console()
    tokenizer = Tokenizer.from_dir(cfg.tokenizer.path or cfg.checkpoint.dir)
    arch = read_arch(cfg.checkpoint.dir, format=cfg.checkpoint.format)
    if cfg.adapter.path is not None:
        read_adapter(cfg.adapter.path)  # before rows, which may be many
    batches = None
    if cfg.data.eval is not None:
        data = read_dataset(cfg.data.eval, tokenizer, cfg.data)
        check_token_range(data, arch.vocab_size)
        check_positions(data, arch.max_position_embeddings)
        batches = Batches(
            data,
            batch_size=cfg.batch_size,
            packing=cfg.data.packing,
            max_seq_len=cfg.data.max_seq_len,
            shuffle=False,
        )
    tasks = find_tasks(**asdict(cfg.lm_eval)) if cfg.lm_eval.tasks else None
    options: dict[str, Any] = {
        "quantize": cfg.quantize,
        "format": cfg.checkpoint.format,
        "device": device,
        "dtype": None if cfg.dtype == "auto" else resolve_dtype(cfg.dtype),
        "compute_dtype": resolve_compute_dtype(cfg.compute_dtype, device),
        "allow_base_mismatch": cfg.adapter.allow_base_mismatch,
    }
    load = partial(load_with_adapter, cfg.checkpoint.dir, cfg.adapter.path, **options)
    models = [Candidate("the model", None, load)]
    if cfg.compare:
        models = find_candidates(cfg.checkpoint.dir, cfg.adapter.path, **options)

    results: dict[str, Any] = {}
    if batches is not None:
        console.print(batches.summary())
        results |= {"data": data.report.source, "examples": len(data)}
        results["skipped_rows"] = data.report.skipped_rows
    figures: dict[str, dict[str, Figure]] = {}
    details: dict[str, dict[str, Any]] = {}
    for one in reversed(models):  # an adapter that does not fit is found at once
        model = one.load()
        figures[one.name], details[one.name] = measure(model, cfg, tokenizer, batches, tasks)
        del model  # before the next one is loaded
    last = models[-1].name
    results |= details[last]
    if cfg.exact_match:
        console.print(answer_table(results["answers"], last))
    if cfg.compare:
        in_order = {one.name: figures[one.name] for one in models}
        against = {one.name: one.against for one in models if one.against is not None}
        console.print(comparison_table(in_order, against))
        results["models"] = {name: details[name] for name in in_order}
        results["differences"] = differences(in_order)
    else:
        console.print(figure_table(figures[last]))
    if cfg.output is not None:
        write_whole(Path(cfg.output), f"{visible_json(results, indent=2)}\n".encode())


def measure(
    model: CausalLM,
    cfg: EvaluateConfig,
    tokenizer: Tokenizer,
    batches: Batches | None,
    tasks: Tasks | None,
) -> tuple[dict[str, Figure], dict[str, Any]]:
    """All figures of one model, and what there is about it for the JSON file."""
    figures: dict[str, Figure] = {}
    details: dict[str, Any] = {}
    if batches is not None:
        figures = measure_rows(model, batches.of_epoch(0, resolve_device(cfg.device)))
        details = {"target_tokens": sum(figures["loss"].weights)}
        details |= {name: figure.value for name, figure in figures.items()}
        if cfg.exact_match:
            figures["exact_match"], answers = measure_answers(
                model, batches.dataset, cfg.exact_match, max_new_tokens=cfg.max_new_tokens
            )
            right = sum(answer["right"] for answer in answers)
            details |= {"exact_match": right / len(answers), "right": right, "answers": answers}
    if tasks is not None:
        found, details["tasks"] = tasks.measure(model, tokenizer, batch_size=cfg.batch_size)
        figures |= found
    details["standard_errors"] = {name: figure.error for name, figure in figures.items()}
    return figures, details


def answer_table(answers: list[dict[str, Any]], model: str, shown: int = 3) -> Table:
    right = sum(answer["right"] for answer in answers)
    title = f"{model}: {right} of {counted(len(answers), 'answer')} right; the first of them"
    table = Table(title=title, show_lines=True)
    for column in ("prompt", "reference", "answer", "right"):
        table.add_column(column, overflow="fold")
    for answer in answers[:shown]:
        right = "yes" if answer["right"] else "no"
        table.add_row(spell_asked(answer), answer["reference"], answer["answer"], right)
    return table


if __name__ == "__main__":
    sys.exit(run_recipe(main, "evaluate"))
