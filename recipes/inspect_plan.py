"""Show what `finetune` with the same arguments would build: slots, bits, bytes, what trains.

    qlora inspect [model.arch=llama3_1_8b] [method=lora] [key=value ...]

Nothing is loaded; the model is built without memory. Named so because a file `inspect.py` in this
folder would hide the standard library's module from `python recipes/...`.
"""

from __future__ import annotations

import sys

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from qlora_builders.checkpoint import read_arch
from qlora_builders.config.entry import run_recipe
from qlora_builders.config.plan import plan_rules, train_patterns
from qlora_builders.config.schema import FinetuneConfig
from qlora_builders.models import SummaryRow, get_arch, llama, summarize
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
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(
            highlight=False, soft_wrap=True, width=140
        )  # rich would fold a piped table to 80 columns
    console.print(plan_table(rows))
    base, adapter = sum(r.base_bytes for r in rows), sum(r.adapter_bytes for r in rows)
    parameters, trainable = sum(r.parameters for r in rows), sum(r.trainable for r in rows)
    console.print(
        f"{parameters:,} base parameters in {base / 2**20:,.1f} MiB "
        f"({8 * base / parameters:.2f} bits each), {adapter / 2**20:,.1f} MiB of adapters; "
        f"{trainable:,} parameters train",
    )
    if trainable == 0:
        console.print("this plan trains nothing: `finetune` would refuse it")


def plan_table(rows: list[SummaryRow]) -> Table:
    """Options at zero or false are left out: they change nothing."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("slot", no_wrap=True)
    table.add_column("component", no_wrap=True)
    table.add_column("options", overflow="fold")
    for column in ("parameters", "bits", "MiB", "trains"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        mib = (row.base_bytes + row.adapter_bytes) / 2**20
        table.add_row(
            row.name,
            row.kind,
            " ".join(f"{name}={value}" for name, value in row.options.items() if value),
            f"{row.parameters:,}",
            f"{row.bits:.2f}" if row.parameters else "tied",
            f"{mib:,.2f}",
            f"{row.trainable:,}" if row.trainable else "-",
        )
    return table


if __name__ == "__main__":
    sys.exit(run_recipe(main, "inspect"))
