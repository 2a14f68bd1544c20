"""Activation checkpointing (https://arxiv.org/abs/1604.06174): what a layer keeps for backward.

none       everything autograd asks for
selective  the layer's input and the attention's output; the rest is computed again
full       the layer's input
offload    as full, with the input in pinned host memory until backward
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from qlora_builders.modules.documents import DOCUMENT_ATTENTION

aten = torch.ops.aten
_KEPT_OPS = {
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    DOCUMENT_ATTENTION,
}


def run_checkpointed(mode: str, function: Callable[..., Tensor], x: Tensor, *args: Any) -> Tensor:
    """`function(x, *args)`, keeping for backward what `mode` says; "offload" is as "full" here."""
    if mode == "none" or not torch.is_grad_enabled():
        return function(x, *args)
    if mode == "selective":
        contexts = partial(create_selective_checkpoint_contexts, _policy)
        return checkpoint(function, x, *args, use_reentrant=False, context_fn=contexts)
    return checkpoint(function, x, *args, use_reentrant=False)


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = op in _KEPT_OPS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def input_on_host(x: Tensor) -> Iterator[None]:
    """Where backward asks for `x`, it is kept in host memory: around a layer that keeps its input.

    Copies run in the order of the stream, so neither direction has to wait for the host.
    """
    pointer, shape = x.data_ptr(), x.shape  # the hooks live as long as the graph: not x itself

    def pack(saved: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        if saved.data_ptr() != pointer or saved.shape != shape:
            return saved  # shared by all layers, or a parameter
        host = torch.empty_like(saved, device="cpu", pin_memory=saved.is_cuda)
        return saved.device, host.copy_(saved, non_blocking=True)

    def unpack(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, host = packed
        return host.to(device, non_blocking=True)

    with saved_tensors_hooks(pack, unpack):
        yield
