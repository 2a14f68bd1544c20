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
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from math import ceil
from pathlib import Path
from typing import Any, TypeVar

import torch

from qlora_builders.checkpoint import load_checkpoint, save_adapter, save_checkpoint
from qlora_builders.checkpoint.run_dir import (
    AUTO,
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
from qlora_builders.data import Batches, Tokenizer, build_dataset
from qlora_builders.distributed import (
    Ranks,
    sharding,
    whole_parameters,
    whole_state,
    with_ranks,
)
from qlora_builders.errors import ConfigError, TrainingError
from qlora_builders.models import get_arch
from qlora_builders.modules import CausalLM
from qlora_builders.preflight import check_run
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

T = TypeVar("T")


@with_ranks
def main(cfg: FinetuneConfig, ranks: Ranks) -> None:
    run_dir = Path(ranks.on_main(lambda: cfg.output_dir))  # its default holds the time
    start = ranks.on_main(lambda: first_step(cfg, run_dir, ranks))
    loggers = make_loggers(cfg, ranks, run_dir, start)
    gather = ranks.gather
    device = resolve_device(cfg.device, local_rank=ranks.local_rank)
    compute_dtype = resolve_compute_dtype(cfg.training.compute_dtype, device)
    set_seed(cfg.training.seed)
    train_data, eval_data = load_data(cfg, ranks)
    total_steps = count_steps(cfg, train_data)
    about = describe_run(cfg, train_data, total_steps, device, compute_dtype)
    check_resume(start, about, cfg)

    model = prepare_model(cfg, ranks, device, compute_dtype)
    about["compile"] = prepare_layers(model, cfg, ranks, total_steps, start.about.get("compile"))
    parameters = trainable_parameters(model)
    optimizer = instantiate(cfg.optimizer, optimizer_groups(model, cfg), key="optimizer")
    if start.folder is not None:
        load_step(start.folder, model, optimizer)
    schedule = make_schedule(cfg, optimizer, total_steps, start.step)
    checked = check_run(cfg, model, train_data, eval_data, optimizer, about["compile"])
    lines = [*start.messages, *checked, f"{total_steps} steps to do"]
    if cfg.dry_run:
        ranks.on_main(lambda: print(*lines, sep="\n"))
        return
    environment = describe_environment(device, compute_dtype) | {"total_steps": total_steps}
    with (
        open_run(cfg, ranks, run_dir, start, loggers, environment) as metrics,
        stop_on_signal(gather) as stop,
        ProgressReport(total_steps, steps_done=start.step, quiet=not ranks.is_main) as progress,
    ):
        about_model = f"{summary(model)}, on {ranks.size} x {device.type}, in {run_dir}"
        for line in (*lines, about_model):
            progress.say(line)

        def evaluate(step: int) -> None:
            due = step in (0, total_steps) or is_due(step, cfg.training.eval_every)
            if eval_data is None or not due or metrics.has_eval(step):
                return
            batches = until_stopped(eval_data.of_epoch(0, device), stop)
            loss, tokens = evaluate_loss(model, batches, gather=gather)
            if stop.agreed():
                return
            metrics.write(step=step, eval_loss=loss, eval_tokens=tokens)
            progress.say(f"step {step}: eval loss {loss:.4f}")
            if cfg.training.samples and step in (0, total_steps):
                folder = run_dir if ranks.is_main else None
                add_samples(folder, step, model, eval_data.dataset, cfg.training.samples)

        def save(step: int) -> None:
            def write() -> None:
                metrics.sync()
                add_step(run_dir, step, model, state, about=about, base_model=cfg.checkpoint.dir)
                remove_old_steps(run_dir, cfg.training.keep_last)

            state = whole_state(optimizer, ranks)
            write_whole(model, ranks, write)

        model.train()
        step, clip = start.step, cfg.training.clip_grad_norm
        evaluate(step)
        while step < total_steps and not stop.agreed():
            step += 1
            ranks.seed_step(cfg.training.seed, step)
            batches = train_data.of_step(step, cfg.training.grad_accumulation, device)
            started = time.perf_counter()
            try:
                result = train_step(model, batches, optimizer, clip_grad_norm=clip, gather=gather)
            except TrainingError as error:
                saved = ranks.on_main(lambda: bool(step_folders(run_dir)))
                if step > 1 and not saved and all_finite(parameters, gather=gather):
                    save(step - 1)
                last = ranks.on_main(lambda: last_checkpoint(run_dir))
                raise TrainingError(
                    f"step {step}: {error} of {cfg.data.train}. {last}; "
                    "lower optimizer.lr or look at these rows"
                ) from error
            lr = float(schedule.get_last_lr()[0])
            schedule.step()
            if step % cfg.training.log_every == 0 or step == total_steps:
                seconds, memory = time.perf_counter() - started, peak_memory_mib(device)
                row = step_row(step, result, lr=lr, seconds=seconds, memory=memory)
                metrics.write(**row)
                progress.step(row)
            if is_due(step, cfg.training.save_every):
                save(step)
            evaluate(step)
        ranks.on_main(lambda: write_csv(run_dir))
        if stop.agreed():
            if step and not ranks.on_main(step_folder(run_dir, step).exists):
                save(step)
            progress.say(f"stopped by signal {stop.signal_number} after step {step}")
            progress.say(f"{last_checkpoint(run_dir)}; training.resume=auto takes the run up again")
            sys.exit(stop.exit_code)

        check_adapters_learned(model, gather=gather)
        written = write_whole(model, ranks, lambda: save_result(model, run_dir, cfg))
        progress.say(f"wrote {written}")
    for line in (plot(run_dir), report(run_dir)) if ranks.is_main else ():
        progress.say(line)


def prepare_model(
    cfg: FinetuneConfig, ranks: Ranks, device: torch.device, compute_dtype: torch.dtype
) -> CausalLM:
    """The base under the plan, over the ranks."""
    return load_checkpoint(
        cfg.checkpoint.dir,
        plan_rules(cfg),
        format=cfg.checkpoint.format,
        arch=get_arch(cfg.model.arch) if cfg.model.arch else None,
        train=train_patterns(cfg),
        device="cpu" if cfg.distributed.cpu_offload else device,
        dtype=resolve_dtype(cfg.training.dtype),
        compute_dtype=compute_dtype,
        shard=sharding(ranks, device.type, **asdict(cfg.distributed)),
    )


def prepare_layers(
    model: CausalLM, cfg: FinetuneConfig, ranks: Ranks, total_steps: int, before: str | None
) -> str:
    """What the layers keep for backward, and whether they are compiled: "on" or "off".

    Args:
        before: what a resumed run had, for the same losses to the last bit.
    """
    model.model.activation_checkpointing = cfg.training.activation_checkpointing
    bound_heap(model)
    mode = cfg.training.compile
    if mode == "auto" and before is not None:
        mode = before
    rows = total_steps * cfg.training.batch_size * cfg.training.grad_accumulation
    num_tokens = rows * cfg.data.max_seq_len // ranks.size  # at most
    compiled = compile_layers(model, mode, num_tokens=num_tokens, gather=ranks.gather)
    return "on" if compiled else "off"


def load_data(cfg: FinetuneConfig, ranks: Ranks) -> tuple[Batches, Batches | None]:
    """This rank's part of the batches to train and to evaluate on."""
    tokenizer = Tokenizer.from_dir(cfg.tokenizer.path or cfg.checkpoint.dir)
    train_data = load_batches(cfg.data.train, cfg, ranks, tokenizer, shuffle=True)
    if cfg.data.eval is None:
        return train_data, None
    return train_data, load_batches(cfg.data.eval, cfg, ranks, tokenizer, shuffle=False)


def load_batches(
    source: str, cfg: FinetuneConfig, ranks: Ranks, tokenizer: Tokenizer, *, shuffle: bool
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
        rank=ranks.rank,
        num_ranks=ranks.size,
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


def make_schedule(
    cfg: FinetuneConfig, optimizer: torch.optim.Optimizer, total_steps: int, steps_done: int
) -> torch.optim.lr_scheduler.LambdaLR:
    factor = lr_factor(total_steps=total_steps, **asdict(cfg.lr_schedule))
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor, last_epoch=steps_done - 1)


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


def summary(model: CausalLM) -> str:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{trained:,} of {sum(p.numel() for p in model.parameters()):,} parameters train"


def is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def first_step(cfg: FinetuneConfig, run_dir: Path, ranks: Ranks) -> Start:
    """As the config says; a run that was restarted after a failure goes on where it was."""
    if ranks.restarts and step_folders(run_dir):
        return find_start(run_dir, resume=AUTO, overwrite=False)
    overwrite = cfg.overwrite or ranks.restarts > 0
    return find_start(run_dir, resume=cfg.training.resume, overwrite=overwrite)


@contextmanager
def open_run(
    cfg: FinetuneConfig,
    ranks: Ranks,
    run_dir: Path,
    start: Start,
    loggers: Loggers,
    environment: dict[str, Any],
) -> Iterator[MetricsLog]:
    """The run directory and what goes there all the time, from the main rank alone."""
    if not ranks.is_main:
        yield MetricsLog(run_dir, step=start.step, source=start.run_dir, writes=False)
        return
    overwrite = start.step == 0 and (cfg.overwrite or ranks.restarts > 0)
    keep_last = cfg.training.keep_last
    with run_directory(run_dir, start, overwrite=overwrite, keep_last=keep_last), closing(loggers):
        save_config(cfg, run_dir / "config.yaml")
        add_environment(run_dir, environment, first_step=start.step)
        yield MetricsLog(run_dir, step=start.step, source=start.run_dir, loggers=loggers)


def write_whole(model: CausalLM, ranks: Ranks, write: Callable[[], T]) -> T:
    """`write()` on the main rank, where the model's parameters are whole meanwhile."""
    with whole_parameters(model, ranks, only_trained=has_adapters(model)):
        return ranks.on_main(write)


def save_result(model: CausalLM, run_dir: Path, cfg: FinetuneConfig) -> Path:
    if has_adapters(model):
        save_adapter(model, run_dir / "adapter", base_model=cfg.checkpoint.dir)
        return run_dir / "adapter"
    dtype = resolve_dtype(cfg.training.dtype)
    save_checkpoint(model, run_dir / "model", dtype=dtype, companions=cfg.checkpoint.dir)
    return run_dir / "model"


def make_loggers(cfg: FinetuneConfig, ranks: Ranks, run_dir: Path, start: Start) -> Loggers:
    about: dict[str, Any] = {"run_dir": run_dir, "first_step": start.step}
    return Loggers(
        [
            instantiate(node, key=f"loggers[{index}]", config=asdict(cfg), **about)
            for index, node in enumerate(cfg.loggers if ranks.is_main else [])
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
