"""Loss and perplexity of a checkpoint (and adapter) on a data file, and exact match of answers.

qlora evaluate data.eval=... [checkpoint.dir=...] [adapter.path=...] [exact_match=20]
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qlora_builders.checkpoint import load_with_adapter
from qlora_builders.config.entry import run_recipe
from qlora_builders.config.schema import EvaluateConfig
from qlora_builders.data import (
    Batches,
    Tokenizer,
    build_dataset,
    check_token_range,
)
from qlora_builders.errors import ConfigError
from qlora_builders.outputs import check_writable, write_whole
from qlora_builders.training.device import resolve_compute_dtype, resolve_device, resolve_dtype
from qlora_builders.training.loop import evaluate_loss
from qlora_builders.training.samples import answer_rows


def main(cfg: EvaluateConfig) -> None:
    if cfg.data.eval is None:
        raise ConfigError("data.eval is null; name the file or hub id to evaluate on")
    if cfg.output is not None:
        check_writable(Path(cfg.output), "output")
    device = resolve_device(cfg.device)
    tokenizer = Tokenizer.from_dir(cfg.tokenizer.path or cfg.checkpoint.dir)
    data = build_dataset(
        cfg.data.eval,
        tokenizer,
        format=cfg.data.format,
        max_seq_len=cfg.data.max_seq_len,
        train_on=cfg.data.train_on,
        columns=asdict(cfg.data.columns),
        max_rows=cfg.data.max_rows,
        on_error=cfg.data.on_error,
    )
    model = load_with_adapter(
        cfg.checkpoint.dir,
        cfg.adapter.path,
        quantize=cfg.quantize,
        format=cfg.checkpoint.format,
        device=device,
        dtype=None if cfg.dtype == "auto" else resolve_dtype(cfg.dtype),
        compute_dtype=resolve_compute_dtype(cfg.compute_dtype, device),
        allow_base_mismatch=cfg.adapter.allow_base_mismatch,
    )
    check_token_range(data, model.spec.arch.vocab_size)

    batches = Batches(
        data,
        batch_size=cfg.batch_size,
        packing=cfg.data.packing,
        max_seq_len=cfg.data.max_seq_len,
        shuffle=False,
    )
    loss, tokens = evaluate_loss(model, batches.of_epoch(0, device))
    results: dict[str, Any] = {
        "data": data.report.source,
        "examples": len(data),
        "skipped_rows": data.report.skipped_rows,
        "target_tokens": tokens,
        "loss": loss,
        "perplexity": math.exp(loss),
    }
    console = Console(highlight=False, soft_wrap=True)
    console.print(batches.summary())
    console.print(
        f"loss {loss:.4f}  perplexity {math.exp(loss):.3f}", highlight=False, soft_wrap=True
    )
    if cfg.exact_match:
        answers = list(answer_rows(model, data, cfg.exact_match, max_new_tokens=cfg.max_new_tokens))
        right = sum(answer["right"] for answer in answers)
        results |= {"exact_match": right / len(answers), "right": right, "answers": answers}
        console.print(answer_table(answers))
        console.print(f"exact match: {right} of {len(answers)}")
    if cfg.output is not None:
        text = json.dumps(results, indent=2, ensure_ascii=False)
        write_whole(Path(cfg.output), f"{text}\n".encode())


def answer_table(answers: list[dict[str, Any]], shown: int = 3) -> Table:
    table = Table(title=f"the first {min(shown, len(answers))} answers", show_lines=True)
    for column in ("prompt", "reference", "answer", "right"):
        table.add_column(column, overflow="fold")
    for answer in answers[:shown]:
        prompt = " ".join(answer["prompt"].split())
        right = "yes" if answer["right"] else "no"
        table.add_row(prompt, answer["reference"], answer["answer"], right)
    return table


if __name__ == "__main__":
    sys.exit(run_recipe(main, "evaluate"))
