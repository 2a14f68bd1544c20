"""A base checkpoint and the adapter trained on it, as one model."""

from __future__ import annotations

from pathlib import Path

import torch

from qlora_builders.checkpoint.hf_llama import load_checkpoint
from qlora_builders.checkpoint.peft_adapter import (
    NF4_BASE,
    adapter_plan,
    check_quantize,
    load_adapter,
    read_adapter,
)
from qlora_builders.modules import CausalLM


def load_with_adapter(
    path: str | Path,
    adapter: str | Path | None,
    *,
    quantize: str = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    compute_dtype: torch.dtype | None = None,
) -> CausalLM:
    """A checkpoint with its adapter, or the checkpoint alone, in eval mode.

    Args:
        path: the base checkpoint.
        adapter: an adapter directory, or None.
        quantize: as for `adapter_plan`; "auto" without an adapter is "none".
        device, dtype, compute_dtype: as for `load_checkpoint`.

    Raises:
        CheckpointError: if either cannot be read or they do not fit each other.
    """
    check_quantize(quantize)
    if adapter is not None:
        components, train = adapter_plan(read_adapter(adapter), quantize=quantize)
    else:
        components, train = [NF4_BASE] if quantize == "nf4" else [], []
    model = load_checkpoint(
        path, components, train=train, device=device, dtype=dtype, compute_dtype=compute_dtype
    )
    if adapter is not None:
        load_adapter(model, adapter)
    return model.eval()
