"""The loop of a run: steps, evaluations, checkpoints, and leaving when a signal asks for it."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterable, Iterator
from typing import NoReturn

import torch

from qlora_builders.console import StopRequest
from qlora_builders.errors import TrainingError
from qlora_builders.evaluation.measure import answer_rows
from qlora_builders.files.outputs import (
    SAMPLES_FILE,
    append_rows,
    how_to_go_on,
    last_checkpoint,
    step_folders,
)
from qlora_builders.modules import CausalLM
from qlora_builders.runs.folder import Checkpoints, Data, Log, Run, step_folder
from qlora_builders.training.device import peak_memory_mib
from qlora_builders.training.loggers import pair_figures, step_row
from qlora_builders.training.objectives import Batch, Objective
from qlora_builders.training.optimizers import all_finite, trainable_parameters
from qlora_builders.training.step import evaluate_objective, train_step

_SAMPLE_TOKENS = 128  # of an answer at most


def train(
    run: Run,
    data: Data,
    model: CausalLM,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    log: Log,
    objective: Objective,
) -> None:
    """All steps that are left of the run.

    Raises:
        TrainingError: if the loss or the gradient is not finite, after a checkpoint was saved.
        CheckpointError: if a checkpoint cannot be written.
        SystemExit: after a signal, with a checkpoint to go on from.
    """
    cfg, ranks, step = run.cfg.training, run.ranks, run.start.step
    model.train()
    _evaluate(run, data, model, log, objective, step)
    with Checkpoints(run, data, model, optimizer, log) as checkpoints:
        while step < data.total_steps and not log.stop.agreed():
            step += 1
            ranks.seed_step(cfg.seed, step)
            batches = data.train.of_step(step, cfg.grad_accumulation, run.device)
            started = time.perf_counter()
            try:
                result = train_step(
                    model,
                    batches,
                    optimizer,
                    clip_grad_norm=cfg.clip_grad_norm,
                    gather=ranks.gather,
                    objective=objective,
                )
            except TrainingError as error:
                _save_before(step, run, model, checkpoints)
                last = ranks.on_main(lambda: last_checkpoint(run.folder))
                raise TrainingError(
                    f"step {step}: {error} of {run.cfg.data.train}. {last}; "
                    "lower optimizer.lr or look at these rows"
                ) from error
            lr = float(schedule.get_last_lr()[0])
            schedule.step()
            if step % cfg.log_every == 0 or step == data.total_steps:
                seconds, memory = time.perf_counter() - started, peak_memory_mib(run.device)
                row = step_row(step, result, lr=lr, seconds=seconds, memory=memory)
                log.metrics.write(**row)
                log.progress.step(row)
            if _is_due(step, cfg.save_every):
                checkpoints.save(step)
            _evaluate(run, data, model, log, objective, step)
        stopped = log.stop.agreed()
        if stopped:
            checkpoints.finish()
            if step and not ranks.on_main(step_folder(run.folder, step).exists):
                checkpoints.save(step)
    if stopped:
        _leave(run, log, step)


def _save_before(step: int, run: Run, model: CausalLM, checkpoints: Checkpoints) -> None:
    """A checkpoint of the step before a bad one, where there is none and it would be good."""
    checkpoints.finish()
    saved = run.ranks.on_main(lambda: bool(step_folders(run.folder)))
    if step > 1 and not saved and all_finite(trainable_parameters(model), gather=run.ranks.gather):
        checkpoints.save(step - 1)
        checkpoints.finish()


def _leave(run: Run, log: Log, step: int) -> NoReturn:
    assert log.stop.signal_number is not None
    name = signal.Signals(log.stop.signal_number).name
    log.progress.say(f"stopped by {name} after step {step}")
    log.progress.say(how_to_go_on(run.folder))
    sys.exit(log.stop.exit_code)


def _evaluate(
    run: Run, data: Data, model: CausalLM, log: Log, objective: Objective, step: int
) -> None:
    """Where it is due and has not been done; nothing is said of one that a signal ends."""
    cfg, ends = run.cfg.training, (0, data.total_steps)
    due = step in ends or _is_due(step, cfg.eval_every)
    if data.eval is None or not due or log.metrics.has_eval(step):
        return
    batches = until_stopped(data.eval.of_epoch(0, run.device), log.stop)
    result = evaluate_objective(model, batches, objective, gather=run.ranks.gather)
    if log.stop.agreed():
        return
    figures = {f"eval_{key}": value for key, value in result.figures.items()}
    log.metrics.write(step=step, eval_loss=result.loss, eval_tokens=result.target_tokens, **figures)
    log.progress.say(f"step {step}: eval loss {result.loss:.4f}{pair_figures(figures, 'eval_')}")
    if cfg.samples and step in ends:
        answers = answer_rows(model, data.eval.dataset, cfg.samples, max_new_tokens=_SAMPLE_TOKENS)
        rows = [{"step": step, **answer} for answer in answers]  # a forward pass of all ranks
        if run.ranks.is_main:
            append_rows(run.folder / SAMPLES_FILE, rows)


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def until_stopped(batches: Iterable[Batch], stop: StopRequest) -> Iterator[Batch]:
    """The batches until `stop` is set, and at least one."""
    for batch in batches:
        yield batch
        if stop.agreed():
            return
