"""From a config to what a step needs: the run's folder and start, data, model, optimizer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime
from inspect import Parameter, signature
from math import ceil
from pathlib import Path
from typing import Any, cast

import torch

from qlora_builders.analysis.preflight import check_run
from qlora_builders.checkpoint import load_checkpoint
from qlora_builders.config.instantiate import instantiate
from qlora_builders.config.plan import plan_rules, train_patterns
from qlora_builders.config.schema import FinetuneConfig
from qlora_builders.config.sections import DataConfig
from qlora_builders.data import Batches, TokenizedDataset, Tokenizer, build_dataset
from qlora_builders.distributed import Ranks, sharding
from qlora_builders.errors import ConfigError, counted
from qlora_builders.files.outputs import step_folders
from qlora_builders.models import get_arch
from qlora_builders.modules import CausalLM
from qlora_builders.runs.about import (
    check_about,
    check_resume,
    check_resumed_base,
    describe,
    describe_base,
)
from qlora_builders.runs.folder import AUTO, Start, find_start
from qlora_builders.runs.state import load_step
from qlora_builders.training.device import (
    bound_heap,
    compile_layers,
    resolve_compute_dtype,
    resolve_device,
    resolve_dtype,
    set_seed,
)
from qlora_builders.training.loggers import Loggers
from qlora_builders.training.optimizers import lora_plus_groups, lr_factor, trainable_parameters


@dataclass(frozen=True)
class Run:
    """A run before anything is loaded."""

    cfg: FinetuneConfig
    ranks: Ranks
    folder: Path
    start: Start
    loggers: Loggers
    device: torch.device
    compute_dtype: torch.dtype


@dataclass(frozen=True)
class Data:
    """This rank's part of the batches, and how many steps they make.

    Attributes:
        about: what a checkpoint says about its run: all that its loss curve depends on.
    """

    train: Batches
    eval: Batches | None
    total_steps: int
    about: dict[str, Any]


def begin(cfg: FinetuneConfig, ranks: Ranks) -> Run:
    """Find the run's folder and start, set its seed.

    Raises:
        ConfigError: if the folder holds something else, or the device is not there.
    """
    folder = Path(ranks.on_main(lambda: cfg.output_dir))  # its default holds the time
    start = ranks.on_main(lambda: _first_step(cfg, folder, ranks))
    loggers = _make_loggers(cfg, ranks, folder, start)
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
    cfg = run.cfg
    # that a chat template prints: the run keeps it when it goes on another day
    date = run.start.about.get("date") or run.ranks.on_main(lambda: datetime.now().isoformat())
    tokenizer = Tokenizer.from_dir(
        cfg.tokenizer.path or cfg.checkpoint.dir, now=datetime.fromisoformat(date)
    )
    train = _load_batches(cfg.data.train, run, tokenizer, shuffle=True)
    evaluated = None
    if cfg.data.eval is not None:
        evaluated = _load_batches(cfg.data.eval, run, tokenizer, shuffle=False)
    total_steps = _count_steps(cfg, train)
    resolved = {
        "data.train": train.dataset.fingerprint(),
        "device": run.device.type,
        "training.compute_dtype": str(run.compute_dtype).removeprefix("torch."),
    }
    about = describe(cfg, resolved, total_steps) | {"date": date}
    check_resume(run.start, about, cfg)
    return Data(train, evaluated, total_steps, about)


def read_dataset(source: str, tokenizer: Tokenizer, data: DataConfig) -> TokenizedDataset:
    """
    Raises:
        DataError: for rows that cannot be used.
    """
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
    """The base under the plan, over the ranks; which it is, and whether it is compiled, goes to
    `data.about`.

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
    data.about["base"] = describe_base(model)
    check_resumed_base(run.start, data.about["base"], cfg)
    data.about["compile"] = _prepare_layers(model, run, data.total_steps)
    return model


def make_optimizer(
    run: Run, data: Data, model: CausalLM
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """The optimizer and the schedule of its learning rate; with the model as the checkpoint left
    them, where the run goes on from one."""
    cfg, start = run.cfg, run.start
    optimizer = build_optimizer(cfg, _optimizer_groups(model, cfg))
    if start.folder is not None:
        rates = [group["lr"] for group in optimizer.param_groups]
        load_step(start.folder, model, optimizer)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["initial_lr"] = rate  # of which the schedule takes fractions
    factor = lr_factor(total_steps=data.total_steps, **asdict(cfg.lr_schedule))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor, last_epoch=start.step - 1)
    return optimizer, schedule


def build_optimizer(cfg: FinetuneConfig, parameters: list[Any]) -> torch.optim.Optimizer:
    """
    Raises:
        ConfigError: for arguments that it refuses, and for one that a run cannot step.
    """
    optimizer = instantiate(cfg.optimizer, "optimizer", [parameters], key="optimizer")
    _check_steps(optimizer, cfg.optimizer["component"])
    return cast(torch.optim.Optimizer, optimizer)


def look_ahead(
    run: Run, data: Data, model: CausalLM, optimizer: torch.optim.Optimizer
) -> list[str]:
    """Lines about the run: how it starts, its data, what looks wrong.

    Raises:
        DataError: for rows with ids or positions that the model does not have.
    """
    compiled = data.about["compile"]
    checked = check_run(run.cfg, model, data.train, data.eval, optimizer, compiled)
    left = data.total_steps - run.start.step
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    about = (
        f"{trained:,} of {total:,} parameters train, on {run.ranks.size} x {run.device.type}, in "
        f"{run.folder}"
    )
    ends = "; a dry run ends here, with nothing written" if run.cfg.dry_run else ""
    steps = counted(data.total_steps, "step")
    if run.start.step:
        steps = f"{left} of {steps}"
    return [*run.start.messages, *checked, about, f"{steps} to do{ends}"]


def _first_step(cfg: FinetuneConfig, folder: Path, ranks: Ranks) -> Start:
    """As the config says; a run that was restarted after a failure goes on where it was."""
    if ranks.restarts and step_folders(folder):
        return find_start(folder, resume=AUTO, overwrite=False, check_about=check_about)
    return find_start(
        folder,
        resume=cfg.training.resume,
        overwrite=cfg.overwrite or ranks.restarts > 0,
        check_about=check_about,
    )


def _make_loggers(cfg: FinetuneConfig, ranks: Ranks, folder: Path, start: Start) -> Loggers:
    about = {"run_dir": folder, "first_step": start.step, "config": asdict(cfg)}
    nodes = cfg.loggers if ranks.is_main and not cfg.dry_run else []
    loggers = []
    for index, node in enumerate(nodes):
        logger = instantiate(node, "logger", kwargs=about, key=f"loggers[{index}]")
        if not all(callable(getattr(logger, method, None)) for method in ("log", "close")):
            raise ConfigError(
                f"loggers[{index}].component={node['component']} gives a {type(logger).__name__}; "
                "name a class with log and close"
            )
        loggers.append(logger)
    return Loggers(loggers)


def _load_batches(source: str, run: Run, tokenizer: Tokenizer, *, shuffle: bool) -> Batches:
    cfg = run.cfg
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


def _count_steps(cfg: FinetuneConfig, data: Batches) -> int:
    if cfg.training.max_steps is not None:
        return cfg.training.max_steps
    return ceil(data.per_epoch * cfg.training.epochs / cfg.training.grad_accumulation)


def _prepare_layers(model: CausalLM, run: Run, total_steps: int) -> str:
    """What the layers keep for backward, and whether they are compiled: "on" or "off".

    A resumed run has what it had before, for the same losses to the last bit.
    """
    cfg = run.cfg
    model.model.activation_checkpointing = cfg.training.activation_checkpointing
    bound_heap(model)
    mode, before = cfg.training.compile, run.start.about.get("compile")
    if mode == "auto" and before is not None:
        mode = before
    rows = total_steps * cfg.training.batch_size * cfg.training.grad_accumulation
    num_tokens = rows * cfg.data.max_seq_len // run.ranks.size  # at most
    compiled = compile_layers(model, mode, num_tokens=num_tokens, gather=run.ranks.gather)
    return "on" if compiled else "off"


def _check_steps(optimizer: Any, component: str) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        kind = type(optimizer).__name__
        raise ConfigError(
            f"optimizer.component={component} gives a {kind}; name an optimizer, such as "
            "torch.optim.AdamW"
        )
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise ConfigError(
            f"optimizer.component={component} takes sparse gradients, and these are dense; name "
            "another, such as torch.optim.AdamW"
        )
    closure = signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is Parameter.empty:
        raise ConfigError(
            f"optimizer.component={component} computes the loss several times per step, which a "
            "run does once; name another, such as torch.optim.AdamW"
        )


def _optimizer_groups(model: CausalLM, cfg: FinetuneConfig) -> list[Any]:
    parameters = trainable_parameters(model)
    ratio = cfg.training.lora_plus_ratio
    if ratio is None:
        return parameters
    return lora_plus_groups(model, lr=cfg.optimizer["lr"], ratio=ratio)
