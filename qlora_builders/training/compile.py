"""torch.compile for the decoder layers: one graph that all layers of a kind share.

Compiling layer by layer takes as long for 80 layers as for one, and sequence lengths are symbolic,
so that rows of any length run the same code. PyTorch keeps the result on disk
(TORCHINDUCTOR_CACHE_DIR): a later run of the same model starts in a few seconds.

auto  where the run is long enough to gain time
on    whatever it costs
off   never
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from qlora_builders.modules import CausalLM
from qlora_builders.tensor.sharded import compute_device
from qlora_builders.training.step import Gather, alone

# `auto` compiles when the run's matmuls take longer than this. CPU: compiling took 60 s on a busy
# machine and saved 2 % of a step (CPU time of one AVX-512 thread, medians of three: 8.05 s and
# 7.89 s; 374M parameters, 512 tokens, float32). CUDA: not measured; torchtune's published figures
# (7075 and 8998 tokens/s) say 21 %.
_PAYS_AFTER_SECONDS = {"cpu": 3000.0, "cuda": 300.0}
# Graphs per layer code: kinds of layers in a plan, times batches of one row and of several.
_GRAPHS = 64


def compile_layers(model: CausalLM, mode: str, *, num_tokens: int, gather: Gather = alone) -> bool:
    """Compile every decoder layer in place, or not; says which.

    The weights, their names and hooks stay as they are. Random numbers (dropout) are those of
    uncompiled layers. FSDP2's hooks run around the compiled code.

    Args:
        mode: one of those above.
        num_tokens: of the whole run on this rank, for "auto".
    """
    if mode == "off" or (mode == "auto" and not gather(_pays(model, num_tokens))[0]):
        return False
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _GRAPHS)
    dynamo.skip_fsdp_guards = False  # else sizes of a sharded layer are taken for symbolic ones
    for layer in model.model.layers:
        layer.compile(fullgraph=True, dynamic=True, options={"fallback_random": True})
    # a frozen embedding would give the first layer a graph of its own, without an input gradient
    model.model.embed_tokens.register_forward_hook(_require_grad)
    return True


def _pays(model: CausalLM, num_tokens: int) -> bool:
    enough = _PAYS_AFTER_SECONDS.get(compute_device(model).type)
    return enough is not None and matmul_seconds(model, num_tokens) > enough


def matmul_seconds(model: CausalLM, num_tokens: int) -> float:
    """Estimated seconds of two products of all layers' weights with `num_tokens` tokens."""
    weights = sum(
        module.weight.numel()
        for name, module in model.model.layers.named_modules()
        if hasattr(module, "in_features") and "lora_" not in name
    )
    return 2 * weights * num_tokens / _multiplications_per_second(model)


def _multiplications_per_second(model: CausalLM, *, rows: int = 512, size: int = 2048) -> float:
    device, dtype = compute_device(model), model.model.compute_dtype
    a = torch.ones(rows, size, device=device, dtype=dtype)
    b = torch.ones(size, size, device=device, dtype=dtype)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for a GPU
        times.append(time.perf_counter() - started)
    return rows * size * size / min(times)


def _require_grad(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output
