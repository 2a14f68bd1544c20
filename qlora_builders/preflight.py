"""What can be known to go wrong before the first step: warnings, each with what to do.

What certainly goes wrong is an error where it is found: rows that train on nothing, ids that the
model does not have, a plan that trains nothing. Here are the things that may be meant.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from qlora_builders.config.schema import FinetuneConfig
from qlora_builders.data import Batches, TokenizedDataset, check_token_range
from qlora_builders.errors import DataError
from qlora_builders.models import llama
from qlora_builders.modules import CausalLM, TokenEmbedding
from qlora_builders.tensor.sharded import is_sharded
from qlora_builders.training.memory import predict_phases, probe_optimizer

# Adam's steps are about as large as the learning rate, whatever the gradient
ADAPTER_LR = (1e-6, 1e-2)
WEIGHT_LR = (1e-8, 1e-3)
_TRAINED_NORM = 0.01  # of the median: rows that were never trained are far shorter
_SHOWN = 5


def check_run(
    cfg: FinetuneConfig,
    model: CausalLM,
    train_data: Batches,
    eval_data: Batches | None,
    optimizer: torch.optim.Optimizer,
    compiled: str,
) -> list[str]:
    """A line about each dataset, and one for everything that looks wrong.

    The weights of a sharded model are not looked at.

    Args:
        compiled: whether the layers are: "on" or "off".

    Raises:
        DataError: for rows with ids or positions that the model does not have.
    """
    found = []
    for role, data in (("train", train_data), ("eval", eval_data)):
        if data is not None:
            check_token_range(data.dataset, model.spec.arch.vocab_size)
            check_positions(data.dataset, model.spec.arch.max_position_embeddings)
            found.append(f"{role} {data.summary()}")
    dataset = train_data.dataset
    warnings = [*stop_warnings(dataset), *lr_warnings(optimizer)]
    if not any(is_sharded(parameter) for parameter in model.parameters()):
        longest = min(dataset.report.longest_row, cfg.data.max_seq_len)
        peak = predicted_peak(
            model,
            batch_size=cfg.training.batch_size * dataset.per_row,
            seq_len=longest if cfg.data.packing == "none" else cfg.data.max_seq_len,
            accumulate=cfg.training.grad_accumulation > 1,
            compiled=compiled == "on",
        )
        warnings += [*token_warnings(dataset, model), *memory_warnings(model, peak)]
    return [*found, *(f"warning: {line}" for line in warnings)]


def check_positions(dataset: TokenizedDataset, positions: int) -> None:
    """
    Raises:
        DataError: naming the first row that is longer than the model's positions.
    """
    lengths = np.diff(dataset.offsets)
    if lengths.max() > positions:
        index = int(np.argmax(lengths > positions))
        raise DataError(
            f"{dataset.describe_row(int(dataset.row_numbers[index]))}: has {lengths[index]} tokens,"
            f" but the model was made for {positions} positions; lower data.max_seq_len"
        )


def stop_warnings(dataset: TokenizedDataset) -> Iterator[str]:
    stops = dataset.tokenizer.stop_token_ids
    trained = dataset.input_ids[dataset.trained]
    if not stops:
        yield (
            f"{dataset.report.source}: the tokenizer names no token that ends a text, so answers "
            "will not end; add eos_token to its tokenizer_config.json"
        )
    elif not np.isin(trained, list(stops)).any():
        names = ", ".join(repr(dataset.tokenizer.token(stop)) for stop in stops)
        yield (
            f"{dataset.report.source}: no example is trained to end (in {names}), so answers will "
            "not end; raise data.max_seq_len if it cut them all; a chat template has to end turns"
        )


def token_warnings(dataset: TokenizedDataset, model: CausalLM) -> Iterator[str]:
    """Tokens of the data whose embedding nobody has trained, and nobody will."""
    weight = model.get_parameter("model.embed_tokens.weight")
    if weight.requires_grad:
        return
    ids, counts = np.unique(dataset.input_ids, return_counts=True)
    embedding = model.model.embed_tokens
    if isinstance(embedding, TokenEmbedding):
        rest = ~np.isin(ids, embedding.token_adapter.tokens)
        ids, counts = ids[rest], counts[rest]
    rows = weight.detach()[torch.from_numpy(ids).to(weight.device)]
    norms = torch.linalg.vector_norm(rows.float(), dim=1).cpu().numpy()
    short = norms < _TRAINED_NORM * np.median(norms)
    if short.any():
        order = np.argsort(-counts[short])[:_SHOWN]
        names = ", ".join(
            f"{dataset.tokenizer.token(int(ids[short][i]))!r} ({counts[short][i]} times)"
            for i in order
        )
        yield (
            f"{dataset.report.source}: {int(short.sum())} tokens have an embedding that was never "
            f"trained: {names}; train them by train_tokens=[{','.join(map(str, ids[short]))}], or "
            "use a chat template of other tokens"
        )


def lr_warnings(optimizer: torch.optim.Optimizer) -> Iterator[str]:
    """Of Adam and its relatives: others have other scales."""
    if "adam" not in type(optimizer).__name__.lower():
        return
    for group in optimizer.param_groups:
        rates = WEIGHT_LR if _trains_weights(group["params"]) else ADAPTER_LR
        lr = float(group.get("initial_lr", group["lr"]))
        if not rates[0] <= lr <= rates[1]:
            kind = "whole weights" if rates is WEIGHT_LR else "adapters"
            yield (
                f"optimizer.lr is {lr:g}; for {kind}, {rates[0]:g} to {rates[1]:g} is usual: "
                + ("the run may learn nothing" if lr < rates[0] else "the run may diverge")
            )


def _trains_weights(parameters: list[nn.Parameter]) -> bool:
    """Adapters have one side of a few hundred at most."""
    return any(p.dim() == 2 and min(p.shape) > 1024 for p in parameters)


def predicted_peak(
    model: CausalLM, *, batch_size: int, seq_len: int, accumulate: bool, compiled: bool
) -> int:
    """Bytes at the peak of a step, with fused AdamW, as `qlora estimate` predicts it."""
    spec = model.spec
    like = llama(
        spec.arch,
        spec.components,
        train=spec.train,
        device="meta",
        dtype=spec.dtype,
        compute_dtype=model.model.compute_dtype,
    )
    like.model.activation_checkpointing = model.model.activation_checkpointing
    phases = predict_phases(
        like,
        probe_optimizer(lambda parameters: torch.optim.AdamW(parameters, fused=True)),
        device_type=_device(model).type,
        batch_size=batch_size,
        seq_len=seq_len,
        accumulate=accumulate,
        compiled=compiled,
    )
    return max(phase.peak for phase in phases)


def memory_warnings(model: CausalLM, peak: int) -> Iterator[str]:
    """Beside the weights, which are there already."""
    device = _device(model)
    more = peak - sum(parameter.nbytes for parameter in model.parameters())
    free = free_memory(device)
    if free is not None and more > free:
        yield (
            f"a step is predicted to take {more / 2**30:.1f} GiB beside the weights, but {device} "
            f"has {free / 2**30:.1f} GiB free; qlora estimate memory={free / 2**30:.1f}GiB shows "
            "what fits, training.activation_checkpointing=full needs less"
        )


def _device(model: CausalLM) -> torch.device:
    return model.get_parameter("model.norm.weight").device


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated; None where this cannot be known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return None
    available = next(line for line in lines if line.startswith("MemAvailable:"))
    return min(int(available.split()[1]) * 1024, _group_limit())


def _group_limit() -> int:
    """What a container's memory limit leaves."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / f"memory.{name}").read_text() for name in ("max", "current"))
        return int(limit) - int(used)
    except (OSError, ValueError):  # no such limit
        return 2**63
