"""What can be known to go wrong before the first step: warnings, each with what to do.

What certainly goes wrong is an error where it is found: rows that train on nothing, ids that the
model does not have, a plan that trains nothing. Here are the things that may be meant.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from qlora_builders.analysis.memory import predict_phases, probe_optimizer
from qlora_builders.config.schema import FinetuneConfig
from qlora_builders.data import Batches, TokenizedDataset, check_token_range, padded
from qlora_builders.errors import DataError
from qlora_builders.models import llama
from qlora_builders.modules import CausalLM, LoRALinear, TokenEmbedding
from qlora_builders.tensor.sharded import is_sharded

# Adam's steps are about as large as the learning rate, whatever the gradient. The upper ends are
# for layers of _WIDTH and more; narrower ones take more, in inverse proportion
# (https://arxiv.org/abs/2203.03466)
ADAPTER_LR = (1e-5, 1e-3)
WEIGHT_LR = (1e-7, 1e-4)
_WIDTH = 4096
_PREFERENCES = 0.01  # of the lower end: DPO moves less
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
    warnings = [
        *stop_warnings(dataset),
        *rank_warnings(model),
        *lr_warnings(optimizer, model, preferences=dataset.per_row > 1),
        *load_warnings(_device(model)),
    ]
    if not any(is_sharded(parameter) for parameter in model.parameters()):
        longest = min(padded(dataset.report.longest_row), cfg.data.max_seq_len)
        peak = predicted_peak(
            model,
            batch_size=cfg.training.batch_size * dataset.per_row,
            seq_len=longest if cfg.data.packing == "none" else cfg.data.max_seq_len,
            accumulate=cfg.training.grad_accumulation > 1,
            compiled=compiled == "on",
        )
        found.append(f"predicted peak: {peak / 2**30:.2f} GiB, by qlora estimate's reckoning")
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


def rank_warnings(model: CausalLM) -> Iterator[str]:
    """Adapters that take more memory than the weight, and can do no more than it."""
    wasted = Counter(
        f"{name.rpartition('.')[2]} (rank {module.rank}, {module.out_features} x "
        f"{module.in_features})"
        for name, module in model.named_modules()
        if isinstance(module, LoRALinear) and module.rank > min(*module.weight.shape)
    )
    if wasted:
        yield (
            "adapters of a higher rank than their weight can have, which only costs: "
            f"{', '.join(f'{count} x {slot}' for slot, count in wasted.items())}; "
            "lower the rank to the smaller size of the weight at most"
        )


def lr_warnings(
    optimizer: torch.optim.Optimizer, model: CausalLM, *, preferences: bool = False
) -> Iterator[str]:
    """Of Adam and its relatives: others have other scales.

    Args:
        preferences: whether the data is pairs of answers.
    """
    if "adam" not in type(optimizer).__name__.lower():
        return
    adapts = any(isinstance(module, LoRALinear) for module in model.modules())
    kind, (low, high) = ("adapters", ADAPTER_LR) if adapts else ("whole weights", WEIGHT_LR)
    width = model.spec.arch.hidden_size
    low, high = low * (_PREFERENCES if preferences else 1), high * max(1, _WIDTH / width)
    # the lowest: LoRA+ makes others of it
    lr = min(float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups)
    if not low <= lr <= high:
        yield (
            f"optimizer.lr is {lr:g}; for {kind} of layers {width} wide, {low:g} to {high:g} is "
            "usual: " + ("the run may learn nothing" if lr < low else "the run may diverge")
        )


def predicted_peak(
    model: CausalLM, *, batch_size: int, seq_len: int, accumulate: bool, compiled: bool
) -> int:
    """Bytes at the peak of a step, with fused AdamW, as `qlora estimate` predicts it."""
    spec = model.spec
    dtypes = {"dtype": spec.dtype, "compute_dtype": model.model.compute_dtype}
    like = llama(spec.arch, spec.components, train=spec.train, device="meta", **dtypes)
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


def load_warnings(device: torch.device) -> Iterator[str]:
    """Of a CPU that others use. OpenMP's threads wait for the slowest of them."""
    cores, threads, others = os.cpu_count() or 1, torch.get_num_threads(), busy_elsewhere()
    if device.type == "cpu" and others + threads > 1.5 * cores:
        yield (
            f"{others} threads of other processes compute on these {cores} cores, where this one "
            f"has {threads} that wait for each other: a step can take many times as long; "
            f"{'stop the others' if threads == 1 else 'set OMP_NUM_THREADS=1 or stop the others'}"
        )


def busy_elsewhere(samples: int = 5) -> int:
    """Threads of other processes that compute now; 0 where Linux does not tell."""
    try:
        found = []
        for _ in range(samples):
            time.sleep(0.01)  # until this process's own threads sleep too
            running, _all = Path("/proc/loadavg").read_text().split()[3].split("/")
            found.append(int(running) - 1)
        return min(found)
    except OSError:
        return 0


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
    available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    group = Path("/sys/fs/cgroup")
    try:  # what a container's memory limit leaves
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # no such limit
        return available * 1024
    return min(available * 1024, limit - used)
