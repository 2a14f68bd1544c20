"""From a config to what a step needs: the run's folder and start, data, model, optimizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from inspect import Parameter, signature
from math import ceil
from pathlib import Path
from typing import Any, cast

import torch

from qlora_builders.analysis.preflight import check_run
from qlora_builders.checkpoint import load_checkpoint
from qlora_builders.checkpoint.base_record import differing_keys
from qlora_builders.config.checks import check_same_curve, curve_config, refuse_to_resume
from qlora_builders.config.instantiate import instantiate
from qlora_builders.config.schema import FinetuneConfig, plan_rules, train_patterns
from qlora_builders.config.sections import DataConfig
from qlora_builders.data import Batches, TokenizedDataset, Tokenizer, build_dataset
from qlora_builders.distributed import Ranks, sharding
from qlora_builders.errors import ConfigError, counted
from qlora_builders.files.outputs import step_folders
from qlora_builders.models import get_arch
from qlora_builders.modules import CausalLM
from qlora_builders.runs.folder import AUTO, Data, Run, base_of, find_start
from qlora_builders.runs.state import load_step
from qlora_builders.training.device import (
    bound_heap,
    compile_layers,
    is_compiled,
    resolve_compute_dtype,
    resolve_device,
    resolve_dtype,
    set_seed,
)
from qlora_builders.training.loggers import Logger
from qlora_builders.training.optimizers import (
    check_same_past,
    lora_plus_groups,
    lr_factor,
    trainable_parameters,
)

# keys -> what they lead to: the base, which is compared by itself
_LEAD_TO_BASE = ("checkpoint.dir", "checkpoint.format", "model.arch")
_ABOUT: dict[str, type] = {"total_steps": int, "config": dict, "compile": str}


def begin(cfg: FinetuneConfig, ranks: Ranks) -> Run:
    """Find the run's folder and start, set its seed.

    Raises ConfigError if the folder holds something else, or the device is not there.
    """
    folder = Path(ranks.on_main(lambda: cfg.output_dir))  # its default holds the time
    resume, overwrite = cfg.training.resume, cfg.overwrite or ranks.restarts > 0
    if ranks.restarts and ranks.on_main(lambda: bool(step_folders(folder))):
        resume, overwrite = AUTO, False  # after a failure it goes on where it was
    start = ranks.on_main(
        lambda: find_start(folder, resume=resume, overwrite=overwrite, check_about=_check_about)
    )
    about = {"run_dir": folder, "first_step": start.step, "config": asdict(cfg)}
    loggers: list[Logger] = []
    for index, node in enumerate(cfg.loggers if ranks.is_main and not cfg.dry_run else []):
        logger = instantiate(node, "logger", kwargs=about, key=f"loggers[{index}]")
        if not all(callable(getattr(logger, method, None)) for method in ("log", "close")):
            raise ConfigError(
                f"loggers[{index}].component={node['component']} gives a {type(logger).__name__}; "
                "name a class with log and close"
            )
        loggers.append(logger)
    device = resolve_device(cfg.device, local_rank=ranks.local_rank)
    compute_dtype = resolve_compute_dtype(cfg.training.compute_dtype, device)
    set_seed(cfg.training.seed)
    return Run(cfg, ranks, folder, start, loggers, device, compute_dtype)


def load_data(run: Run) -> Data:
    """
    Raises:
        DataError: for rows that cannot be trained on.
        ConfigError: if the run goes on from a checkpoint with other data or another config.
    """
    cfg, start = run.cfg, run.start
    # that a chat template prints: the run keeps it when it goes on another day
    date = start.about.get("date") or run.ranks.on_main(lambda: datetime.now().isoformat())
    tokenizer = Tokenizer.from_dir(
        cfg.tokenizer.path or cfg.checkpoint.dir, now=datetime.fromisoformat(date)
    )

    def load(source: str, *, shuffle: bool) -> Batches:
        return Batches(
            read_dataset(source, tokenizer, cfg.data),
            batch_size=cfg.training.batch_size,
            packing=cfg.data.packing,
            max_seq_len=cfg.data.max_seq_len,
            seed=cfg.training.seed,
            shuffle=shuffle,
            rank=run.ranks.rank,
            num_ranks=run.ranks.size,
        )

    train = load(cfg.data.train, shuffle=True)
    evaluated = None if cfg.data.eval is None else load(cfg.data.eval, shuffle=False)
    total_steps = cfg.training.max_steps
    if total_steps is None:
        total_steps = ceil(train.per_epoch * cfg.training.epochs / cfg.training.grad_accumulation)
    config = curve_config(cfg) | {
        "data.train": train.dataset.fingerprint(),
        "device": run.device.type,
        "training.compute_dtype": str(run.compute_dtype).removeprefix("torch."),
    }
    # infinity, which an optimizer may take, is no JSON
    config = json.loads(json.dumps(config), parse_constant=str)
    if start.folder is not None:  # the run that was stopped; its base is looked at later
        free = _LEAD_TO_BASE if "base" in start.about else ()
        before, now = (
            {key: value for key, value in one.items() if key not in free}
            for one in (start.about["config"], config)
        )
        check_same_curve(before, now, str(start.folder))
        check_same_past(
            asdict(cfg.lr_schedule),
            total_steps=total_steps,
            before=start.about["total_steps"],
            steps_done=start.step,
        )
    about = {"total_steps": total_steps, "config": config, "date": date}
    return Data(train, evaluated, total_steps, about)


def read_dataset(source: str, tokenizer: Tokenizer, data: DataConfig) -> TokenizedDataset:
    """Raises DataError for rows that cannot be used."""
    return build_dataset(
        source,
        tokenizer,
        format=data.format,
        max_seq_len=data.max_seq_len,
        train_on=data.train_on,
        columns=asdict(data.columns),
        max_rows=data.max_rows,
        on_error=data.on_error,
    )


def load_model(run: Run, data: Data) -> CausalLM:
    """The base under the plan, over the ranks, its layers compiled or not.

    Raises:
        CheckpointError: for a base that cannot be loaded.
        ConfigError: if the run goes on from a checkpoint on another base.
    """
    cfg, ranks, device = run.cfg, run.ranks, run.device
    model = load_checkpoint(
        cfg.checkpoint.dir,
        plan_rules(cfg),
        format=cfg.checkpoint.format,
        arch=get_arch(cfg.model.arch) if cfg.model.arch else None,
        train=train_patterns(cfg),
        device="cpu" if cfg.distributed.cpu_offload else device,
        dtype=resolve_dtype(cfg.training.dtype),
        compute_dtype=run.compute_dtype,
        shard=sharding(ranks, device.type, **asdict(cfg.distributed)),
    )
    before, base = run.start.about.get("base"), base_of(model)
    if before is not None:  # content decides, wherever the base lies
        problems = differing_keys(before["config"], base["config"])
        if before["content"] != base["content"]:
            problems.append(
                f"content of its weights: trained with {before['content'][:12]}, here "
                f"{base['content'][:12]}"
            )
        name = f"checkpoint.dir={cfg.checkpoint.dir}"
        if cfg.model.arch is not None:
            name += f" model.arch={cfg.model.arch}"
        if problems:
            lines = [f"{name}: {problem}" for problem in problems]
            raise refuse_to_resume(str(run.start.folder), "with another base", lines)
    model.model.activation_checkpointing = cfg.training.activation_checkpointing
    bound_heap(model)
    mode = cfg.training.compile
    if mode == "auto":  # a resumed run has what it had before: the same losses to the last bit
        mode = run.start.about.get("compile", mode)
    rows = data.total_steps * cfg.training.batch_size * cfg.training.grad_accumulation
    num_tokens = rows * cfg.data.max_seq_len // ranks.size  # at most
    compile_layers(model, mode, num_tokens=num_tokens, gather=ranks.gather)
    return model


def make_optimizer(
    run: Run, data: Data, model: CausalLM
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """The optimizer and the schedule of its learning rate; with the model as the checkpoint left
    them, where the run goes on from one."""
    cfg, start = run.cfg, run.start
    parameters: list[Any] = trainable_parameters(model)
    ratio = cfg.training.lora_plus_ratio
    if ratio is not None:
        parameters = lora_plus_groups(model, lr=cfg.optimizer["lr"], ratio=ratio)
    optimizer = build_optimizer(cfg, parameters)
    if start.folder is not None:
        rates = [group["lr"] for group in optimizer.param_groups]
        load_step(start.folder, model, optimizer)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["initial_lr"] = rate  # of which the schedule takes fractions
    factor = lr_factor(total_steps=data.total_steps, **asdict(cfg.lr_schedule))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor, last_epoch=start.step - 1)
    return optimizer, schedule


def build_optimizer(cfg: FinetuneConfig, parameters: list[Any]) -> torch.optim.Optimizer:
    """Raises ConfigError for arguments that it refuses, and for one that a run cannot step."""
    optimizer = instantiate(cfg.optimizer, "optimizer", [parameters], key="optimizer")
    problem = None
    if not isinstance(optimizer, torch.optim.Optimizer):
        problem = f"gives a {type(optimizer).__name__}; name an optimizer"
    elif isinstance(optimizer, torch.optim.SparseAdam):
        problem = "takes sparse gradients, and these are dense; name another"
    else:
        closure = signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is Parameter.empty:
            problem = (
                "computes the loss several times per step, which a run does once; name another"
            )
    if problem:
        name = cfg.optimizer["component"]
        raise ConfigError(f"optimizer.component={name} {problem}, such as torch.optim.AdamW")
    return cast(torch.optim.Optimizer, optimizer)


def look_ahead(
    run: Run, data: Data, model: CausalLM, optimizer: torch.optim.Optimizer
) -> list[str]:
    """Lines about the run: how it starts, its data, what looks wrong.

    Raises DataError for rows with ids or positions that the model does not have.
    """
    compiled = "on" if is_compiled(model) else "off"
    checked = check_run(run.cfg, model, data.train, data.eval, optimizer, compiled)
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    about = (
        f"{trained:,} of {total:,} parameters train, on {run.ranks.size} x {run.device.type}, in "
        f"{run.folder}"
    )
    ends = "; a dry run ends here, with nothing written" if run.cfg.dry_run else ""
    steps = counted(data.total_steps, "step")
    if run.start.step:
        steps = f"{data.total_steps - run.start.step} of {steps}"
    return [*run.start.messages, *checked, about, f"{steps} to do{ends}"]


def _check_about(about: Mapping[str, Any]) -> None:
    """Raises ValueError if it is not what a run says about itself in a step checkpoint."""
    for key, kind in _ABOUT.items():
        if type(about.get(key)) is not kind:
            raise ValueError(f"{key} is {about.get(key)!r:.80}; expected {kind.__name__}")
    if about["step"] > about["total_steps"]:
        raise ValueError(f"step is {about['step']} of a run of {about['total_steps']}")
    if about["compile"] not in ("on", "off"):
        raise ValueError(f"compile is {about['compile']!r:.80}; expected on or off")
    date = about.get("date")  # which, as the base, checkpoints did not have from the first
    try:
        datetime.fromisoformat(date or "2000-01-01")
    except (TypeError, ValueError) as error:
        raise ValueError(f"date is {date!r:.80}; expected one such as 2026-12-01T12:00") from error
    base = about.get("base")
    if base is not None and not (
        isinstance(base, dict)
        and isinstance(base.get("content"), str)
        and isinstance(base.get("config"), dict)
    ):
        raise ValueError(f"base is {base!r:.80}; expected content and config")
