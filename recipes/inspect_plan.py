"""Show what `finetune` with the same arguments would build: slots, bits, bytes, what trains.

    qlora inspect [checkpoint.dir=...] [model.arch=llama3_1_8b] [method=lora] [key=value ...]

The model is built without memory. Where the checkpoint is at hand, its weights are read and
quantized one at a time, and the table shows how far that moves them; `model.arch` alone needs none,
and shows the plan of a 70B at once. Named so because a file `inspect.py` in this folder would hide
the standard library's module from `python recipes/...`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from qlora_builders.checkpoint import read_arch
from qlora_builders.checkpoint.merge_report import WeightFigures, together, weight_figures
from qlora_builders.config.entry import run_recipe
from qlora_builders.config.schema import FinetuneConfig, plan_rules, train_patterns
from qlora_builders.console import PlainConsole, plain_table, table_console
from qlora_builders.models import SummaryRow, get_arch, linear_slots, llama, summarize
from qlora_builders.modules import CausalLM
from qlora_builders.training.device import resolve_dtype


def main(cfg: FinetuneConfig) -> None:
    stored = cfg.checkpoint
    named = cfg.model.arch
    arch = get_arch(named) if named else read_arch(stored.dir, format=stored.format)
    model = llama(
        arch,
        plan_rules(cfg),
        train=train_patterns(cfg),
        device="meta",
        dtype=resolve_dtype(cfg.training.dtype),
    )
    rows = summarize(model)
    console = table_console()
    figures = measure(model, cfg, console)
    console.print(plan_table(rows, figures))
    base, adapter = sum(r.base_bytes for r in rows), sum(r.adapter_bytes for r in rows)
    parameters, trainable = sum(r.parameters for r in rows), sum(r.trainable for r in rows)
    console.print(
        f"{parameters:,} base parameters in {base / 2**20:,.1f} MiB "
        f"({8 * base / parameters:.2f} bits each), {adapter / 2**20:,.1f} MiB of adapters; "
        f"{trainable:,} parameters train",
    )
    if figures:
        console.print("error: |W - NF4(W)| / |W|, of all layers in a row and of the worst of them")
    if trainable == 0:
        console.print("this plan trains nothing: `finetune` would refuse it")


def measure(
    model: CausalLM, cfg: FinetuneConfig, console: PlainConsole
) -> dict[str, WeightFigures]:
    """By slot. Nothing where the plan quantizes nothing, or there is no checkpoint of this arch."""
    stored, arch = cfg.checkpoint, model.spec.arch
    if not any(rule.base != "none" for rule in model.spec.components):
        return {}
    if cfg.model.arch is not None and not (
        Path(stored.dir).is_dir() and read_arch(stored.dir, format=stored.format) == arch
    ):
        return {}
    figures = weight_figures(model, stored.dir, format=stored.format)
    return dict(console.track(figures, "measuring quantization", len(linear_slots(arch))))


def plan_table(rows: list[SummaryRow], figures: Mapping[str, WeightFigures]) -> Table:
    """Options at zero, false or their default are left out: they change nothing."""
    heads = ["rank", "options", "parameters", "bits", "MiB", "trains", *["error"] * bool(figures)]
    table = plain_table(["slot", "component"], heads)
    folded = table.columns[3]
    folded.justify, folded.no_wrap, folded.overflow = "left", False, "fold"
    for row in rows:
        mib = (row.base_bytes + row.adapter_bytes) / 2**20
        options = [
            f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in row.options.items()
            if value and value != "default" and name != "rank"
        ]
        table.add_row(
            row.name,
            row.kind,
            str(row.options.get("rank", "-")),
            " ".join(options),
            f"{row.parameters:,}",
            f"{row.bits:.2f}" if row.parameters else "tied",
            f"{mib:,.2f}",
            f"{row.trainable:,}" if row.trainable else "-",
            *([error_of([figures[s] for s in row.slots if s in figures])] if figures else []),
        )
    return table


def error_of(figures: Sequence[WeightFigures]) -> str:
    """ "9.21 % (9.34 %)": of all together, and of the worst where there are several."""
    relative = [one.relative_error for one in figures if one.relative_error is not None]
    if not relative:
        return "-"
    whole = together([one for one in figures if one.error is not None]).relative_error
    assert whole is not None
    worst = f" ({max(relative):.2%})" if len(relative) > 1 else ""
    return f"{whole:.2%}{worst}"


if __name__ == "__main__":
    sys.exit(run_recipe(main, "inspect"))
