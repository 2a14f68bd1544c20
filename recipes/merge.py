"""Add an adapter to the weights it was trained on and write a Hugging Face directory.

    qlora merge adapter.path=... output_dir=... [checkpoint.dir=...] [base=path/to/originals]

Shows what rounding loses of each layer's update, reads back what it wrote and compares its logits
with those of base + adapter. A merge that loses more than max_error leaves nothing behind.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from qlora_builders.checkpoint import MergeError, MergeReport, load_with_adapter, save_merged
from qlora_builders.config.checks import in_bytes
from qlora_builders.config.entry import run_recipe
from qlora_builders.config.schema import MergeConfig
from qlora_builders.console import plain_table, table_console
from qlora_builders.files.outputs import check_new, write_whole
from qlora_builders.training.device import resolve_dtype
from qlora_builders.visible import say

SHOWN_LAYERS = 8
LEGEND = """W: the weight that is added to; delta: the update; all are norms
error: what rounding lost, written - (W + delta)
deviation: from the trained layer, written - (its W + delta)"""


def main(cfg: MergeConfig) -> None:
    output_dir = Path(cfg.output_dir)
    check_new(output_dir, "output_dir", folder=True)
    if cfg.report is not None:
        check_new(Path(cfg.report), "report")
    adapted = load_with_adapter(
        cfg.checkpoint.dir,
        cfg.adapter.path,
        quantize=cfg.quantize,
        format=cfg.checkpoint.format,
        compute_dtype=torch.float32,
        allow_base_mismatch=cfg.adapter.allow_base_mismatch,
    )
    try:
        report = save_merged(
            adapted,
            output_dir,
            base=cfg.base,
            dtype=resolve_dtype(cfg.dtype),
            format=cfg.format,
            max_error=cfg.max_error,
            allow_base_mismatch=cfg.adapter.allow_base_mismatch,
            max_shard_bytes=in_bytes(cfg.max_shard_size, "file"),
            companions=cfg.checkpoint.dir,
        )
    except MergeError as error:
        show(error.report, cfg)
        raise
    show(report, cfg)
    say(f"wrote {output_dir}")


def show(report: MergeReport, cfg: MergeConfig) -> None:
    table_console().print(error_table(report))
    logits = report.logits
    say(
        f"against base + adapter, on random tokens: logits differ by {logits.relative:.2%} of "
        f"their spread, which is {logits.error:.2%} of what the adapter changes; the likeliest "
        f"token agrees on {logits.top1:.0%}"
    )
    if cfg.report is not None:
        write_whole(Path(cfg.report), f"{report.to_json()}\n".encode())


def error_table(report: MergeReport) -> Table:
    """The layers with the largest errors, and all of them together.

    `error` is what rounding loses, `deviation` also counts that the base may be another than the
    one in training, `kept` is what NF4 leaves of the update. All are ratios of norms.
    """
    order = sorted(report.layers, key=lambda layer: (layer.error, layer.deviation), reverse=True)
    worst = order[:SHOWN_LAYERS]
    quantized = report.total.kept is not None
    heads = ["delta / W", "error / delta", "deviation / delta", *(["kept"] if quantized else [])]
    title = f"{len(worst)} of {len(report.layers)} merged layers, largest error first"
    left: dict[str, Any] = {"title_justify": "left", "caption_justify": "left"}
    table = plain_table(["layer"], heads, title=title, caption=LEGEND, **left)
    for layer in (*worst, report.total):
        figures = [f"{layer.relative_delta:.2%}", f"{layer.error:.3g}", f"{layer.deviation:.3g}"]
        if quantized:
            figures.append("-" if layer.kept is None else f"{layer.kept:.0%}")
        table.add_row(layer.name, *figures, end_section=layer is worst[-1])
    return table


if __name__ == "__main__":
    sys.exit(run_recipe(main, "merge"))
