"""Adapters into weights: W + scaling * B A in float32, one weight at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qlora_builders.checkpoint.hf_llama import base_parameters, lazy_parameter, write_hf_directory
from qlora_builders.checkpoint.safetensors_io import (
    MAX_SHARD_BYTES,
    LazyTensor,
    find_tensors,
    read_tensor,
)
from qlora_builders.errors import CheckpointError
from qlora_builders.models import LlamaArch, llama
from qlora_builders.modules import CausalLM, LoRALinear

DEQUANTIZED = "dequantized"


def merge_adapter(
    model: CausalLM, *, base: str | Path = DEQUANTIZED, dtype: torch.dtype | None = None
) -> CausalLM:
    """A new model of plain layers that computes what base + adapter computes.

    Args:
        model: with adapters; left as it is. Tensors that merging does not change are shared.
        base: "dequantized" adds the update to the weights the adapter was trained on. The path of
            the original 16-bit checkpoint adds it to those: a better base, but another function.
        dtype: of the merged weights; by default each weight's own.

    Raises:
        CheckpointError: if the model has no adapter, or `base` lacks a tensor or its shape.
    """
    arch = _merged_arch(model)
    merged = llama(arch, device="meta", compute_dtype=model.model.compute_dtype)
    tensors = {tensor.name: tensor.load() for tensor in merged_tensors(model, base, dtype)}
    merged.load_state_dict(tensors, assign=True)
    return merged


def save_merged(
    model: CausalLM,
    path: str | Path,
    *,
    base: str | Path = DEQUANTIZED,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    companions: str | Path | None = None,
) -> None:
    """`merge_adapter` straight into a Hugging Face directory; at most one shard is in memory."""
    write_hf_directory(
        list(merged_tensors(model, base, dtype)),
        path,
        arch=_merged_arch(model),
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        companions=companions,
    )


def merged_tensors(
    model: CausalLM, base: str | Path = DEQUANTIZED, dtype: torch.dtype | None = None
) -> Iterator[LazyTensor]:
    """Every parameter of the merged model, computed when it is loaded."""
    adapters = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, LoRALinear)
    }
    if not adapters:
        raise CheckpointError("the model has no LoRA adapter to merge; load one first")
    originals = None if base == DEQUANTIZED else find_tensors(Path(base))
    tied = _merged_arch(model).tie_word_embeddings
    for name, parameter in base_parameters(model).items():
        if tied and name == "lm_head.weight":
            continue
        source = lazy_parameter(name, parameter, None)
        if originals is not None and not parameter.requires_grad:
            source = _original(originals, source, Path(base), parameter.device)
        yield _merged(source, adapters.get(name), parameter.dtype if dtype is None else dtype)


def _merged(weight: LazyTensor, adapter: LoRALinear | None, dtype: torch.dtype) -> LazyTensor:
    """Added in float32 and rounded once."""

    def load() -> Tensor:
        tensor = weight.load()
        if adapter is not None:
            with torch.no_grad():
                tensor = tensor.float() + adapter.lora_delta()
        return tensor.to(dtype)

    return replace(weight, dtype=dtype, load=load)


def _original(
    originals: dict[str, Path], weight: LazyTensor, base: Path, device: torch.device
) -> LazyTensor:
    """The tensor of the original checkpoint in place of the model's (possibly 4-bit) one."""
    name = weight.name
    if name == "lm_head.weight" and name not in originals:
        name = "model.embed_tokens.weight"  # tied in the original
    if name not in originals:
        raise CheckpointError(f"{base}: no tensor {name!r}; is it the base of this adapter?")

    def load() -> Tensor:
        tensor = read_tensor(originals[name], name)
        if tensor.shape != weight.shape:
            raise CheckpointError(
                f"{originals[name]}: {name} has shape {list(tensor.shape)}; "
                f"the model needs {list(weight.shape)}"
            )
        return tensor.to(device, copy=True)  # not the mapped file

    return replace(weight, load=load)


def _merged_arch(model: CausalLM) -> LlamaArch:
    """A head with an adapter of its own is no longer the embedding."""
    arch: LlamaArch = model.spec.arch
    if isinstance(model.lm_head, LoRALinear):
        arch = replace(arch, tie_word_embeddings=False)
    return arch
