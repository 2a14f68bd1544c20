"""Hugging Face directories in and out: built on meta, read tensor by tensor, quantized as read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_builders.checkpoint.base_record import hash_directory
from qlora_builders.checkpoint.hf_config import config_from_arch, read_arch, read_config
from qlora_builders.checkpoint.safetensors_io import (
    MAX_SHARD_BYTES,
    LazyTensor,
    atomic_directory,
    find_tensors,
    listed,
    read_tensor,
    write_shards,
)
from qlora_builders.errors import CheckpointError, did_you_mean
from qlora_builders.models import BaseCheckpoint, ComponentRule, LlamaArch, llama
from qlora_builders.modules import CausalLM, LoRALinear
from qlora_builders.tensor import NF4Tensor

FORMATS = ("hf",)
# what a checkpoint directory holds beside config.json and the weights
_COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def load_checkpoint(
    path: str | Path,
    components: Iterable[ComponentRule | Mapping[str, Any]] = (),
    *,
    arch: LlamaArch | None = None,
    train: Sequence[str] = (),
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    compute_dtype: torch.dtype | None = None,
) -> CausalLM:
    """Build the model of a Hugging Face directory under a component plan, and load its weights.

    The transient memory is one tensor's: each is quantized or cast as it is read.

    Args:
        path: directory with config.json and safetensors, single or sharded.
        arch: overrides what config.json says.
        components, train, dtype, compute_dtype: as for `llama`.

    Raises:
        CheckpointError: for missing, unexpected or wrongly shaped tensors, NaN or infinity in a
            weight to be quantized, or a directory that is not such a checkpoint.
        PlanError: for a plan that does not fit the model.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory; give a local Hugging Face directory")
    model = llama(
        read_arch(path) if arch is None else arch,
        components,
        train=train,
        device="meta",
        dtype=dtype,
        compute_dtype=compute_dtype,
    )
    device = torch.device(device)
    _load_weights(model, path, device)
    content_hash = hash_directory(path, tied=model.tie_word_embeddings)
    model.spec = replace(model.spec, base=BaseCheckpoint("hf", content_hash))
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.lora_A.to_empty(device=device)
            module.lora_B.to_empty(device=device)
            module.reset_lora_parameters()
    return model


def base_parameters(model: nn.Module) -> dict[str, Tensor]:
    """All parameters but the adapters', by name; a tied head is listed too. Nothing is upcast."""
    return {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if ".lora_A." not in name and ".lora_B." not in name
    }


def _load_weights(model: CausalLM, path: Path, device: torch.device) -> None:
    files = {name: f for name, f in find_tensors(path).items() if not name.endswith(".inv_freq")}
    parameters = base_parameters(model)
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    tied = model.tie_word_embeddings
    required = set(parameters) - ({head} if tied else set())
    missing, unexpected = sorted(required - set(files)), sorted(set(files) - set(parameters))
    if missing or unexpected:
        raise CheckpointError(
            f"{path}: tensors missing: {listed(missing)}; not expected: {listed(unexpected)}"
        )
    for name, file in files.items():
        if tied and name == head:
            same = torch.equal(read_tensor(file, name), read_tensor(files[embedding], embedding))
            if not same:
                raise CheckpointError(
                    f"{file}: {head} differs from {embedding}, but config.json ties them"
                )
            continue
        _load_parameter(model, name, parameters[name], file, device)
    model.tie_weights()


def _load_parameter(
    model: nn.Module, name: str, parameter: Tensor, file: Path, device: torch.device
) -> None:
    """Through the owner's load_state_dict, whose pre-hook quantizes where the plan says so."""
    tensor = read_tensor(file, name)
    if not tensor.is_floating_point():
        raise CheckpointError(f"{file}: {name} has dtype {tensor.dtype}; expected floating point")
    if not isinstance(parameter, NF4Tensor):
        tensor = tensor.to(device=device, dtype=parameter.dtype, copy=True)  # not the mapped file
    else:
        tensor = tensor.to(device)
    module_name, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(module_name)
        module.load_state_dict({leaf: tensor}, strict=False, assign=True)
    except RuntimeError as error:
        reason = str(error).partition("\n")[2].strip() or str(error)
        raise CheckpointError(f"{file}: {name}: {reason}") from error


def save_checkpoint(
    model: CausalLM,
    path: str | Path,
    *,
    format: str = "hf",
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    companions: str | Path | None = None,
) -> None:
    """Write a model without adapters as a checkpoint directory; NF4 weights are upcast.

    The directory appears under its name only when it is complete. Memory: one shard.

    Args:
        model: built by `llama` or `load_checkpoint`.
        format: "hf".
        dtype: of the tensors written; by default each parameter's own.
        max_shard_bytes: largest file, but for a tensor that is larger by itself.
        companions: a checkpoint directory to copy tokenizer files and the rest of config.json from.

    Raises:
        CheckpointError: for an unknown format, or a model that still has adapters.
    """
    if format not in FORMATS:
        raise CheckpointError(f"format is {format!r}{did_you_mean(format, FORMATS)}")
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise CheckpointError(
            "the model has LoRA adapters; write them with save_adapter(model, path), or merge them "
            "with merge_adapter(model) first"
        )
    tensors = [
        lazy_parameter(name, parameter, dtype)
        for name, parameter in base_parameters(model).items()
        if not (model.tie_word_embeddings and name == "lm_head.weight")
    ]
    write_hf_directory(
        tensors,
        path,
        arch=model.spec.arch,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        companions=companions,
    )


def lazy_parameter(name: str, parameter: Tensor, dtype: torch.dtype | None) -> LazyTensor:
    out_dtype = parameter.dtype if dtype is None else dtype

    def load() -> Tensor:
        plain = parameter.dequantize() if isinstance(parameter, NF4Tensor) else parameter
        return plain.detach().to(out_dtype)

    return LazyTensor(name, parameter.shape, out_dtype, load)


def write_hf_directory(
    tensors: Sequence[LazyTensor],
    path: str | Path,
    *,
    arch: LlamaArch,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    companions: str | Path | None,
) -> None:
    """config.json, weights, index and tokenizer files, atomically."""
    # config.json names one dtype: that of the largest tensor, where parameters differ
    main_dtype = dtype or max(tensors, key=lambda tensor: tensor.nbytes).dtype
    config = config_from_arch(arch, main_dtype)
    if companions is not None:
        config = _merge_configs(read_config(Path(companions)), config)
    with atomic_directory(path, marker="config.json") as directory:
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for file in _companion_files(companions):
            shutil.copyfile(file, directory / file.name)
        write_shards(tensors, directory, max_shard_bytes=max_shard_bytes)


def _merge_configs(original: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Ours, and from the original what says nothing about the weights (token ids and the like).

    Both spellings of a key that transformers renamed must go, or it would read the stale one.
    """
    renamed = ("dtype", "rope_parameters")
    return {k: v for k, v in original.items() if k not in renamed} | ours


def _companion_files(directory: str | Path | None) -> Iterator[Path]:
    if directory is not None:
        for name in _COMPANIONS:
            file = Path(directory) / name
            if file.is_file():
                yield file
