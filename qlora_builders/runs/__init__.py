"""What the training recipes are made of: a config becomes a run, the run its result.

run = begin(cfg, ranks)                            # its folder, where it starts, device, seed
data = load_data(run)                              # what it trains and evaluates on, how many steps
model = load_model(run, data)                      # the base under the plan, over the ranks
optimizer, schedule = make_optimizer(run, data, model)
lines = look_ahead(run, data, model, optimizer)    # warnings, with what to do
with open_log(run, data, lines) as log:            # metrics, progress, signals
    train(run, data, model, optimizer, schedule, log, objective)
    save_result(run, model, log)
show_result(run, log)
"""

from qlora_builders.runs.folder import Data, Log, Run, open_log, save_result, show_result
from qlora_builders.runs.loop import train
from qlora_builders.runs.setup import (
    begin,
    build_optimizer,
    load_data,
    load_model,
    look_ahead,
    make_optimizer,
    read_dataset,
)

__all__ = [
    "Data",
    "Log",
    "Run",
    "begin",
    "build_optimizer",
    "load_data",
    "load_model",
    "look_ahead",
    "make_optimizer",
    "open_log",
    "read_dataset",
    "save_result",
    "show_result",
    "train",
]
