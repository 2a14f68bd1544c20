"""Predict the peak memory of `finetune` with the same arguments; nothing is loaded.

    qlora estimate [model.arch=llama3_1_8b] [device=cuda] [memory=24GiB] [key=value ...]

On a CPU the figures are resident memory over that of the interpreter with torch; on a GPU those of
torch's allocator, to which the driver adds its own. Packed rows cost what others do; layers are
taken to be compiled with training.compile=on only, as auto depends on the number of steps.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from rich.table import Table

from qlora_builders.analysis.memory import (
    Phase,
    largest_that_fits,
    predict_phases,
    probe_optimizer,
)
from qlora_builders.checkpoint import read_arch
from qlora_builders.config.checks import in_bytes
from qlora_builders.config.entry import run_recipe
from qlora_builders.config.schema import EstimateConfig, plan_rules, train_patterns
from qlora_builders.console import PlainConsole, plain_table
from qlora_builders.models import get_arch, llama
from qlora_builders.runs import build_optimizer
from qlora_builders.training.device import resolve_compute_dtype, resolve_device, resolve_dtype
from qlora_builders.training.optimizers import trainable_parameters

SEQ_STEP = 64  # tokens; the longest sequence is found to this


def main(cfg: EstimateConfig) -> None:
    arch = get_arch(cfg.model.arch) if cfg.model.arch else read_arch(cfg.checkpoint.dir)
    # a GPU that is named need not be here
    device = resolve_device("auto") if cfg.device == "auto" else torch.device(cfg.device)
    model = llama(
        arch,
        plan_rules(cfg),
        train=train_patterns(cfg),
        device="meta",
        dtype=resolve_dtype(cfg.training.dtype),
        compute_dtype=compute_dtype(cfg.training.compute_dtype, device),
    )
    model.model.activation_checkpointing = cfg.training.activation_checkpointing
    trainable_parameters(model)  # an error if nothing trains
    predict = partial(
        predict_phases,
        model,
        probe_optimizer(partial(build_optimizer, cfg)),
        device_type=device.type,
        accumulate=cfg.training.grad_accumulation > 1,
        compiled=cfg.training.compile == "on",
        num_shards=cfg.distributed.shard or cfg.ranks,
        cpu_offload=cfg.distributed.cpu_offload,
    )
    batch_size, seq_len = -(-cfg.training.batch_size // cfg.ranks), cfg.data.max_seq_len
    console = PlainConsole(soft_wrap=True)
    phases = predict(batch_size=batch_size, seq_len=seq_len)
    console.print(phase_table(phases))
    peak = max(phases, key=lambda phase: phase.peak)
    console.print(
        f"peak {gib(peak.peak)} in {peak.name}{' of each rank' if cfg.ranks > 1 else ''}: "
        f"{batch_size} x {seq_len} tokens on {device.type}, "
        f"computed in {str(model.model.compute_dtype).removeprefix('torch.')}"
    )
    if cfg.distributed.cpu_offload and device.type == "cuda":
        console.print("the rank's share of weights, gradients and optimizer is in host memory")
    if cfg.memory is None:
        return

    def peak_of(batch_size: int, seq_len: int) -> int:
        return max(phase.peak for phase in predict(batch_size=batch_size, seq_len=seq_len))

    limit = in_bytes(cfg.memory, "memory")
    longest = largest_that_fits(lambda n: peak_of(batch_size, n), limit, step=SEQ_STEP)
    largest = largest_that_fits(lambda n: peak_of(n, seq_len), limit)
    beyond = f" (the model has {arch.max_position_embeddings:,} positions)"
    console.print(
        f"into {cfg.memory} fit {batch_size} x {longest:,} tokens"
        f"{beyond if longest > arch.max_position_embeddings else ''}, or {largest:,} x {seq_len:,}"
    )
    if not longest and not largest:
        console.print(f"it does not fit: {gib(peak_of(1, 2))} are needed for a row of two tokens")


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """As finetune chooses it; GPUs that are not here are taken to multiply bfloat16 natively."""
    if name == "auto" and device.type == "cuda" and not torch.cuda.is_available():
        return torch.bfloat16
    return resolve_compute_dtype(name, device)


def phase_table(phases: list[Phase]) -> Table:
    """Terms that are zero in every phase are left out."""
    table = plain_table(["MiB at the peak of"], [phase.name for phase in phases])
    terms = dict.fromkeys(name for phase in phases for name in phase.terms)
    for name in terms:
        sizes = [phase.terms.get(name, 0) for phase in phases]
        if any(sizes):
            table.add_row(name, *(mib(size) if size else "-" for size in sizes))
    table.add_section()
    table.add_row("sum", *(mib(phase.peak) for phase in phases))
    return table


def mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"


def gib(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB"


if __name__ == "__main__":
    sys.exit(run_recipe(main, "estimate"))
