"""Train an adapter on preferences, by Direct Preference Optimization.

    qlora dpo checkpoint.dir=... data.train=pairs.jsonl [dpo.beta=0.1] [key=value ...]

The reference is the same base with its adapters off, so there is no second model: a step computes
the log-probabilities of both answers twice, once without adapters and without gradients. To prefer
on top of a finetune, merge that adapter first; an adapter under training is never the reference
(so a LoftQ start, which is not the base's function, has rewards before the first step).

Run directory, resume, checkpoints and result are those of `finetune`. Logged beside the loss, under
TRL's names: rewards/chosen, /rejected, /margins, /accuracies and logps/chosen, /rejected.
"""

from __future__ import annotations

import sys
from dataclasses import asdict

from qlora_builders.config.entry import run_recipe
from qlora_builders.config.schema import DPOConfig
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
from qlora_builders.training.objectives import DPO, check_reference
from qlora_builders.visible import say


@with_ranks
def main(cfg: DPOConfig, ranks: Ranks) -> None:
    run = begin(cfg, ranks)  # its folder, where it starts, device, seed
    data = load_data(run)  # rows of chosen and rejected answers
    model = load_model(run, data)  # the base under the plan, over the ranks
    check_reference(model)
    optimizer, schedule = make_optimizer(run, data, model)
    lines = look_ahead(run, data, model, optimizer)
    if cfg.dry_run:
        ranks.on_main(lambda: say(*lines))
        return
    with open_log(run, data, lines) as log:  # metrics, progress, signals
        train(run, data, model, optimizer, schedule, log, DPO(**asdict(cfg.dpo)))
        save_result(run, model, log)
    show_result(run, log)


if __name__ == "__main__":
    sys.exit(run_recipe(main, "dpo"))
