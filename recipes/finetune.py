"""Fine-tune a Llama: QLoRA, LoRA or full training, which are values of one config.

    qlora finetune checkpoint.dir=... data.train=... [method=lora] [key=value ...]

Writes a run directory: config.yaml, metrics.jsonl, environment.jsonl, checkpoints/step_N,
report.html, and the result in adapter/ (PEFT layout) or, when whole weights were trained, model/
(Hugging Face layout). A run that was stopped goes on with training.resume=auto, as if nothing had
happened.
"""

from __future__ import annotations

import sys

from qlora_builders.config.entry import run_recipe
from qlora_builders.config.schema import FinetuneConfig
from qlora_builders.distributed import Ranks, with_ranks
from qlora_builders.runs import (
    begin,
    load_data,
    load_model,
    look_ahead,
    make_optimizer,
    open_log,
    save_result,
    show_result,
    train,
)
from qlora_builders.training.objectives import NextToken
from qlora_builders.visible import say


@with_ranks
def main(cfg: FinetuneConfig, ranks: Ranks) -> None:
    run = begin(cfg, ranks)  # its folder, where it starts, device, seed
    data = load_data(run)
    model = load_model(run, data)  # the base under the plan, over the ranks
    optimizer, schedule = make_optimizer(run, data, model)
    lines = look_ahead(run, data, model, optimizer)
    if cfg.dry_run:
        ranks.on_main(lambda: say(*lines))
        return
    with open_log(run, data, lines) as log:  # metrics, progress, signals
        train(run, data, model, optimizer, schedule, log, NextToken())
        save_result(run, model, log)
    show_result(run, log)


if __name__ == "__main__":
    sys.exit(run_recipe(main, "finetune"))
