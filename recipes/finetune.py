"""Fine-tune a Llama: QLoRA, LoRA or full training, which are values of one config.

    qlora finetune checkpoint.dir=... data.train=... [method=lora] [key=value ...]

Writes a run directory: config.yaml, metrics.jsonl and .csv, environment.jsonl, checkpoints/step_N,
loss.png, report.html, and the result in adapter/ (PEFT layout) or, when whole weights were trained,
model/ (Hugging Face layout). A run that was stopped goes on with training.resume=auto, as if
nothing had happened.
"""

from __future__ import annotations

import sys
import time
from contextlib import closing
from dataclasses import asdict
from math import ceil
from pathlib import Path
from typing import Any

import torch

from qlora_builders.checkpoint import load_checkpoint, save_adapter, save_checkpoint
from qlora_builders.checkpoint.run_dir import (
    Start,
    add_step,
    find_start,
    last_checkpoint,
    remove_old_steps,
    run_directory,
    step_folder,
    step_folders,
)
from qlora_builders.checkpoint.train_state import has_adapters, load_step
from qlora_builders.config.compose import save_config
from qlora_builders.config.entry import run_recipe
from qlora_builders.config.instantiate import instantiate
from qlora_builders.config.plan import plan_rules, train_patterns
from qlora_builders.config.resume import check_same_curve, curve_config
from qlora_builders.config.schema import FinetuneConfig
from qlora_builders.data import Batches, Tokenizer, build_dataset, check_token_range
from qlora_builders.errors import ConfigError, TrainingError
from qlora_builders.models import get_arch
from qlora_builders.modules import CausalLM
from qlora_builders.report import read_run, write_report
from qlora_builders.training.compile import compile_layers
from qlora_builders.training.device import (
    bound_heap,
    peak_memory_mib,
    resolve_compute_dtype,
    resolve_device,
    resolve_dtype,
    set_seed,
)
from qlora_builders.training.environment import add_environment, describe_environment
from qlora_builders.training.loggers import Loggers
from qlora_builders.training.loop import (
    all_finite,
    check_adapters_learned,
    evaluate_loss,
    stop_on_signal,
    train_step,
    trainable_parameters,
    until_stopped,
)
from qlora_builders.training.lr_schedule import check_same_past, lr_factor
from qlora_builders.training.param_groups import lora_plus_groups
from qlora_builders.training.progress import (
    MetricsLog,
    ProgressReport,
    plot_losses,
    step_row,
    write_csv,
)
from qlora_builders.training.samples import add_samples


def main(cfg: FinetuneConfig) -> None:
    run_dir = Path(cfg.output_dir)
    start = find_start(run_dir, resume=cfg.training.resume, overwrite=cfg.overwrite)
    loggers = make_loggers(cfg, start)
    device = resolve_device(cfg.device)
    compute_dtype = resolve_compute_dtype(cfg.training.compute_dtype, device)
    set_seed(cfg.training.seed)

    tokenizer = Tokenizer.from_dir(cfg.tokenizer.path or cfg.checkpoint.dir)
    train_data = load_batches(cfg.data.train, cfg, tokenizer, shuffle=True)
    eval_data = (
        load_batches(cfg.data.eval, cfg, tokenizer, shuffle=False) if cfg.data.eval else None
    )
    total_steps = count_steps(cfg, train_data)
    about = describe_run(cfg, train_data, total_steps, device, compute_dtype)
    check_resume(start, about, cfg)

    model = prepare_model(cfg, device, compute_dtype)
    about["compile"] = prepare_layers(model, cfg, total_steps, before=start.about.get("compile"))
    for data in filter(None, (train_data, eval_data)):
        check_token_range(data.dataset, model.spec.arch.vocab_size)
    parameters = trainable_parameters(model)
    optimizer = instantiate(cfg.optimizer, optimizer_groups(model, cfg), key="optimizer")
    if start.folder is not None:
        load_step(start.folder, model, optimizer)
    factor = lr_factor(total_steps=total_steps, **asdict(cfg.lr_schedule))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor, last_epoch=start.step - 1)

    with (
        run_directory(run_dir, start, overwrite=cfg.overwrite, keep_last=cfg.training.keep_last),
        stop_on_signal() as stop,
        ProgressReport(total_steps, steps_done=start.step) as progress,
        closing(loggers),
    ):
        save_config(cfg, run_dir / "config.yaml")
        environment = describe_environment(device, compute_dtype)
        add_environment(run_dir, environment, first_step=start.step, total_steps=total_steps)
        metrics = MetricsLog(run_dir, step=start.step, source=start.run_dir, loggers=loggers)
        for line in (*start.messages, *data_summaries(train_data, eval_data)):
            progress.say(line)
        progress.say(f"{parameter_counts(model)}, on {device}, in {run_dir}")

        def evaluate(step: int) -> None:
            due = step in (0, total_steps) or is_due(step, cfg.training.eval_every)
            if eval_data is None or not due or metrics.has_eval(step):
                return
            batches = until_stopped(eval_data.of_epoch(0, device), stop)
            loss, tokens = evaluate_loss(model, batches)
            if not stop:
                metrics.write(step=step, eval_loss=loss, eval_tokens=tokens)
                progress.say(f"step {step}: eval loss {loss:.4f}")
            if cfg.training.samples and step in (0, total_steps) and not stop:
                add_samples(run_dir, step, model, eval_data.dataset, cfg.training.samples)

        def save(step: int) -> None:
            metrics.sync()
            add_step(run_dir, step, model, optimizer, about=about, base_model=cfg.checkpoint.dir)
            remove_old_steps(run_dir, cfg.training.keep_last)

        model.train()
        step = start.step
        evaluate(step)
        while step < total_steps and not stop:
            step += 1
            batches = train_data.of_step(step, cfg.training.grad_accumulation, device)
            started = time.perf_counter()
            try:
                result = train_step(
                    model, batches, optimizer, clip_grad_norm=cfg.training.clip_grad_norm
                )
            except TrainingError as error:
                if step > 1 and not step_folders(run_dir) and all_finite(parameters):
                    save(step - 1)
                raise TrainingError(
                    f"step {step}: {error} of {cfg.data.train}. "
                    f"{last_checkpoint(run_dir)}; lower optimizer.lr or look at these rows"
                ) from error
            lr = float(schedule.get_last_lr()[0])
            schedule.step()
            if step % cfg.training.log_every == 0 or step == total_steps:
                seconds = time.perf_counter() - started
                memory = peak_memory_mib(device)
                row = step_row(step, result, lr=lr, seconds=seconds, memory=memory)
                metrics.write(**row)
                progress.step(row)
            if is_due(step, cfg.training.save_every):
                save(step)
            evaluate(step)
        write_csv(run_dir)
        if stop:
            if step and not step_folder(run_dir, step).exists():
                save(step)
            progress.say(f"stopped by signal {stop.signal_number} after step {step}")
            progress.say(f"{last_checkpoint(run_dir)}; training.resume=auto takes the run up again")
            sys.exit(stop.exit_code)

        check_adapters_learned(model)
        progress.say(f"wrote {save_result(model, run_dir, cfg)}")
    for path in (plot(run_dir), report(run_dir)):
        progress.say(path)


def prepare_model(
    cfg: FinetuneConfig, device: torch.device, compute_dtype: torch.dtype
) -> CausalLM:
    """The base under the plan."""
    return load_checkpoint(
        cfg.checkpoint.dir,
        plan_rules(cfg),
        format=cfg.checkpoint.format,
        arch=get_arch(cfg.model.arch) if cfg.model.arch else None,
        train=train_patterns(cfg),
        device=device,
        dtype=resolve_dtype(cfg.training.dtype),
        compute_dtype=compute_dtype,
    )


def prepare_layers(
    model: CausalLM, cfg: FinetuneConfig, total_steps: int, *, before: str | None
) -> str:
    """What the layers keep for backward, and whether they are compiled: "on" or "off".

    Args:
        before: what a resumed run had, for the same losses to the last bit.
    """
    model.model.activation_checkpointing = cfg.training.activation_checkpointing
    bound_heap(model)
    mode = cfg.training.compile
    rows = total_steps * cfg.training.batch_size * cfg.training.grad_accumulation
    num_tokens = rows * cfg.data.max_seq_len  # at most
    compiled = compile_layers(
        model, before if before and mode == "auto" else mode, num_tokens=num_tokens
    )
    return "on" if compiled else "off"


def load_batches(
    source: str, cfg: FinetuneConfig, tokenizer: Tokenizer, *, shuffle: bool
) -> Batches:
    data = build_dataset(
        source,
        tokenizer,
        format=cfg.data.format,
        max_seq_len=cfg.data.max_seq_len,
        train_on=cfg.data.train_on,
        columns=asdict(cfg.data.columns),
        max_rows=cfg.data.max_rows,
    )
    return Batches(
        data,
        batch_size=cfg.training.batch_size,
        packing=cfg.data.packing,
        max_seq_len=cfg.data.max_seq_len,
        seed=cfg.training.seed,
        shuffle=shuffle,
    )


def count_steps(cfg: FinetuneConfig, data: Batches) -> int:
    if cfg.training.max_steps is not None:
        return cfg.training.max_steps
    return ceil(data.per_epoch * cfg.training.epochs / cfg.training.grad_accumulation)


def optimizer_groups(model: CausalLM, cfg: FinetuneConfig) -> list[Any]:
    ratio = cfg.training.lora_plus_ratio
    if ratio is None:
        return trainable_parameters(model)
    return lora_plus_groups(model, lr=cfg.optimizer["lr"], ratio=ratio)


def describe_run(
    cfg: FinetuneConfig,
    data: Batches,
    total_steps: int,
    device: torch.device,
    compute_dtype: torch.dtype,
) -> dict[str, Any]:
    """What a checkpoint says about its run: all that its loss curve depends on."""
    resolved = {
        "data.train": data.dataset.fingerprint(),
        "device": device.type,
        "training.compute_dtype": str(compute_dtype).removeprefix("torch."),
    }
    return {"total_steps": total_steps, "config": curve_config(cfg) | resolved}


def check_resume(start: Start, about: dict[str, Any], cfg: FinetuneConfig) -> None:
    """The run that goes on has to be the run that was stopped."""
    if start.folder is not None:
        check_same_curve(start.about["config"], about["config"], str(start.folder))
        check_same_past(
            asdict(cfg.lr_schedule),
            total_steps=about["total_steps"],
            before=start.about["total_steps"],
            steps_done=start.step,
        )


def data_summaries(train_data: Batches, eval_data: Batches | None) -> list[str]:
    summaries = [f"train {train_data.summary()}"]
    return summaries if eval_data is None else [*summaries, f"eval {eval_data.summary()}"]


def parameter_counts(model: CausalLM) -> str:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{trained:,} of {sum(p.numel() for p in model.parameters()):,} parameters train"


def is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def save_result(model: CausalLM, run_dir: Path, cfg: FinetuneConfig) -> Path:
    if has_adapters(model):
        save_adapter(model, run_dir / "adapter", base_model=cfg.checkpoint.dir)
        return run_dir / "adapter"
    dtype = resolve_dtype(cfg.training.dtype)
    save_checkpoint(model, run_dir / "model", dtype=dtype, companions=cfg.checkpoint.dir)
    return run_dir / "model"


def make_loggers(cfg: FinetuneConfig, start: Start) -> Loggers:
    about: dict[str, Any] = {"run_dir": Path(cfg.output_dir), "first_step": start.step}
    return Loggers(
        [
            instantiate(node, key=f"loggers[{index}]", config=asdict(cfg), **about)
            for index, node in enumerate(cfg.loggers)
        ]
    )


def report(run_dir: Path) -> str:
    try:
        return f"wrote {write_report([read_run(run_dir)], run_dir / 'report.html')}"
    except ConfigError as error:
        return f"no report: {error}"


def plot(run_dir: Path) -> str:
    try:
        return f"wrote {plot_losses(run_dir)}"
    except ImportError as error:
        return f"no plot: {error}"


if __name__ == "__main__":
    sys.exit(run_recipe(main, "finetune"))
