"""Fine-tune a Llama: QLoRA, LoRA or full training, which are values of one config.

    qlora finetune checkpoint.dir=... data.train=... [method=lora] [key=value ...]

Writes a run directory: config.yaml, metrics.jsonl, checkpoints/step_N, loss.png, and the result in
adapter/ (PEFT layout) or, when whole weights were trained, model/ (Hugging Face layout).
"""

from __future__ import annotations

import itertools
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from math import ceil
from pathlib import Path
from typing import Any

import torch

from qlora_builders.checkpoint import load_checkpoint, save_adapter, save_checkpoint
from qlora_builders.config.compose import save_config
from qlora_builders.config.entry import run_recipe
from qlora_builders.config.instantiate import instantiate
from qlora_builders.config.plan import plan_rules, train_patterns
from qlora_builders.config.schema import DataConfig, FinetuneConfig
from qlora_builders.data import (
    Batch,
    TokenizedDataset,
    Tokenizer,
    batch_indices,
    build_dataset,
    check_token_range,
    collate,
)
from qlora_builders.errors import ConfigError, TrainingError
from qlora_builders.models import get_arch
from qlora_builders.modules import CausalLM, LoRALinear
from qlora_builders.training.compile import compile_layers
from qlora_builders.training.device import (
    peak_memory_mib,
    resolve_compute_dtype,
    resolve_device,
    resolve_dtype,
    set_seed,
)
from qlora_builders.training.loop import (
    all_finite,
    check_adapters_learned,
    evaluate_loss,
    stop_on_signal,
    train_step,
    trainable_parameters,
)
from qlora_builders.training.lr_schedule import lr_factor
from qlora_builders.training.param_groups import lora_plus_groups
from qlora_builders.training.progress import MetricsLog, ProgressReport, plot_losses


def main(cfg: FinetuneConfig) -> None:
    device = resolve_device(cfg.device)
    set_seed(cfg.training.seed)

    tokenizer = Tokenizer.from_dir(cfg.tokenizer.path or cfg.checkpoint.dir)
    train_data = load_data(cfg.data.train, cfg.data, tokenizer)
    eval_data = load_data(cfg.data.eval, cfg.data, tokenizer) if cfg.data.eval else None

    model = load_checkpoint(
        cfg.checkpoint.dir,
        plan_rules(cfg),
        arch=get_arch(cfg.model.arch) if cfg.model.arch else None,
        train=train_patterns(cfg),
        device=device,
        dtype=resolve_dtype(cfg.training.dtype),
        compute_dtype=resolve_compute_dtype(cfg.training.compute_dtype, device),
    )
    for data in filter(None, (train_data, eval_data)):
        check_token_range(data, model.spec.arch.vocab_size)
    parameters = trainable_parameters(model)

    total_steps = count_steps(cfg, len(train_data))
    prepare_layers(model, cfg, total_steps)
    optimizer = instantiate(cfg.optimizer, optimizer_groups(model, cfg), key="optimizer")
    factor = lr_factor(total_steps=total_steps, **asdict(cfg.lr_schedule))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    run_dir = make_run_dir(cfg)
    progress = ProgressReport(total_steps)
    metrics = MetricsLog(run_dir)
    progress.say(f"train {train_data.report.summary()}")
    if eval_data is not None:
        progress.say(f"eval {eval_data.report.summary()}")
    trained = sum(parameter.numel() for parameter in parameters)
    total = sum(parameter.numel() for parameter in model.parameters())
    progress.say(f"{trained:,} of {total:,} parameters train, on {device}, in {run_dir}")

    def evaluate(step: int) -> None:
        if eval_data is not None:
            loss, tokens = evaluate_loss(model, eval_batches(eval_data, cfg, device))
            metrics.write(step=step, eval_loss=loss, eval_tokens=tokens)
            progress.say(f"step {step}: eval loss {loss:.4f}")

    def save_step(step: int) -> None:
        save(model, run_dir / "checkpoints" / f"step_{step}", cfg)
        for old in checkpoint_folders(run_dir)[: -cfg.training.keep_last]:
            shutil.rmtree(old)

    evaluate(0)
    model.train()
    with progress, stop_on_signal() as stop:
        batches_of_steps = itertools.islice(steps(train_data, cfg, device), total_steps)
        for step, batches in enumerate(batches_of_steps, start=1):
            started = time.perf_counter()
            lr = float(schedule.get_last_lr()[0])
            try:
                result = train_step(
                    model, batches, optimizer, clip_grad_norm=cfg.training.clip_grad_norm
                )
            except TrainingError as error:
                if step > 1 and not checkpoint_folders(run_dir) and all_finite(parameters):
                    save_step(step - 1)
                raise TrainingError(
                    f"step {step}: {error} of {cfg.data.train}. "
                    f"{last_checkpoint(run_dir)}; lower optimizer.lr or look at these rows"
                ) from error
            schedule.step()
            if step % cfg.training.log_every == 0 or step == total_steps:
                seconds = time.perf_counter() - started
                speed = result.tokens / seconds
                memory = peak_memory_mib(device)
                metrics.write(
                    step=step,
                    loss=result.loss,
                    lr=lr,
                    grad_norm=result.grad_norm,
                    target_tokens=result.target_tokens,
                    tokens_per_s=round(speed, 1),
                    step_s=round(seconds, 4),
                    peak_memory_mib=round(memory, 1),
                )
                progress.step(step, loss=result.loss, lr=lr, tokens_per_s=speed, memory=memory)
            if is_due(step, cfg.training.save_every) or (stop and step < total_steps):
                save_step(step)
            if stop and step < total_steps:
                progress.say(f"stopped by signal {stop.signal_number} after step {step}")
                progress.say(last_checkpoint(run_dir))
                sys.exit(stop.exit_code)
            if is_due(step, cfg.training.eval_every) and step < total_steps:
                evaluate(step)

    check_adapters_learned(model)
    evaluate(total_steps)
    result_dir = run_dir / ("adapter" if has_adapters(model) else "model")
    save(model, result_dir, cfg)
    progress.say(f"wrote {result_dir}")
    try:
        progress.say(f"wrote {plot_losses(run_dir)}")
    except ImportError as error:
        progress.say(f"no plot: {error}")


def load_data(source: str, data: DataConfig, tokenizer: Tokenizer) -> TokenizedDataset:
    return build_dataset(
        source,
        tokenizer,
        format=data.format,
        max_seq_len=data.max_seq_len,
        train_on=data.train_on,
        columns=asdict(data.columns),
        max_rows=data.max_rows,
    )


def count_steps(cfg: FinetuneConfig, num_examples: int) -> int:
    if cfg.training.max_steps is not None:
        return cfg.training.max_steps
    batches = ceil(num_examples / cfg.training.batch_size) * cfg.training.epochs
    return ceil(batches / cfg.training.grad_accumulation)


def optimizer_groups(model: CausalLM, cfg: FinetuneConfig) -> list[Any]:
    ratio = cfg.training.lora_plus_ratio
    if ratio is None:
        return trainable_parameters(model)
    return lora_plus_groups(model, lr=cfg.optimizer["lr"], ratio=ratio)


def prepare_layers(model: CausalLM, cfg: FinetuneConfig, total_steps: int) -> None:
    model.model.activation_checkpointing = cfg.training.activation_checkpointing
    rows_per_step = cfg.training.batch_size * cfg.training.grad_accumulation
    num_tokens = total_steps * rows_per_step * cfg.data.max_seq_len  # at most
    compile_layers(model, cfg.training.compile, num_tokens=num_tokens)


def steps(
    data: TokenizedDataset, cfg: FinetuneConfig, device: torch.device
) -> Iterator[Sequence[Batch]]:
    """The batches of one optimizer step after another; epochs follow each other without end."""

    def batches() -> Iterator[Batch]:
        for epoch in itertools.count():
            for indices in batch_indices(
                len(data),
                batch_size=cfg.training.batch_size,
                seed=cfg.training.seed,
                epoch=epoch,
            ):
                yield to_batch(data, indices, device)

    remaining = batches()
    while True:
        yield list(itertools.islice(remaining, cfg.training.grad_accumulation))


def eval_batches(
    data: TokenizedDataset, cfg: FinetuneConfig, device: torch.device
) -> Iterator[Batch]:
    for indices in batch_indices(
        len(data), batch_size=cfg.training.batch_size, seed=0, epoch=0, shuffle=False
    ):
        yield to_batch(data, indices, device)


def to_batch(data: TokenizedDataset, indices: Sequence[int], device: torch.device) -> Batch:
    examples = [data[index] for index in indices]
    return collate(examples, pad_token_id=data.tokenizer.pad_token_id).to(device)


def make_run_dir(cfg: FinetuneConfig) -> Path:
    run_dir = Path(cfg.output_dir)
    if run_dir.exists() and any(run_dir.iterdir()):
        if not cfg.overwrite:
            raise ConfigError(
                f"output_dir={run_dir} is not empty; choose another, or set overwrite=true"
            )
        if not (run_dir / "config.yaml").is_file():
            raise ConfigError(
                f"output_dir={run_dir} holds no run; overwrite=true replaces only runs"
            )
        shutil.rmtree(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    save_config(cfg, run_dir / "config.yaml")
    return run_dir


def is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def has_adapters(model: CausalLM) -> bool:
    return any(isinstance(module, LoRALinear) for module in model.modules())


def save(model: CausalLM, folder: Path, cfg: FinetuneConfig) -> None:
    if has_adapters(model):
        save_adapter(model, folder, base_model=cfg.checkpoint.dir)
    else:
        save_checkpoint(
            model,
            folder,
            dtype=resolve_dtype(cfg.training.dtype),
            companions=cfg.checkpoint.dir,
        )


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """Oldest first."""
    folders = (run_dir / "checkpoints").glob("step_*")
    return sorted(folders, key=lambda folder: int(folder.name.removeprefix("step_")))


def last_checkpoint(run_dir: Path) -> str:
    folders = checkpoint_folders(run_dir)
    return f"the last checkpoint is {folders[-1]}" if folders else "no checkpoint was written"


if __name__ == "__main__":
    sys.exit(run_recipe(main, "finetune"))
