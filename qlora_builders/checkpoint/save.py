"""Models to checkpoint directories: Hugging Face's, or one that keeps quantized weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_builders.checkpoint.formats import FORMATS
from qlora_builders.checkpoint.formats.hf import (
    CONFIG_FILE,
    CheckpointFormat,
    config_from_arch,
    read_config,
)
from qlora_builders.checkpoint.formats.quantized import lazy_parts
from qlora_builders.checkpoint.tensor_files import MAX_SHARD_BYTES, STEM, LazyTensor, write_shards
from qlora_builders.errors import CheckpointError, did_you_mean
from qlora_builders.files.folders import atomic_directory
from qlora_builders.models import LlamaArch, hf_name, linear_slots
from qlora_builders.modules import CausalLM, LoRALinear, is_adapter
from qlora_builders.tensor import Format, format_of, plain

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


def base_parameters(model: nn.Module) -> dict[str, Tensor]:
    """All parameters but the adapters', by name; a tied head is listed too. Nothing is upcast."""
    return {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not is_adapter(name)
    }


def hf_parameters(model: CausalLM) -> dict[str, Tensor]:
    """`base_parameters` that a checkpoint holds: a tied head is the embedding."""
    parameters = base_parameters(model)
    if model.tie_word_embeddings:
        del parameters["lm_head.weight"]
    return parameters


def save_checkpoint(
    model: CausalLM,
    path: str | Path,
    *,
    format: str = "hf",
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    companions: str | Path | None = None,
) -> None:
    """Write a model without adapters as a checkpoint directory.

    The directory appears under its name only when it is complete. Memory: one tensor.

    Args:
        model: built by `llama` or `load_checkpoint`.
        format: "hf" upcasts quantized weights. "nf4" and "native" (`formats/quantized.py`)
            and "bnb-4bit" (which transformers and bitsandbytes load) keep their codes; all but
            "native" write NF4 only.
        dtype: of the plain tensors written; by default each parameter's own.
        max_shard_bytes: largest file, but for a tensor that is larger by itself.
        companions: a checkpoint directory to copy tokenizer files and the rest of config.json from.

    Raises:
        CheckpointError: for an unknown format, a model that still has adapters, or a quantized
            format and a model without such weights.
    """
    row = written_format(format)
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise CheckpointError(
            "the model has LoRA adapters; write them with save_adapter(model, path), or merge them "
            "with merge_adapter(model) first"
        )
    parameters = hf_parameters(model)
    tensors = [lazy_parameter(name, parameter, dtype) for name, parameter in parameters.items()]
    quantization, dtype = None, dtype or _main_dtype(tensors)
    if row.pack is not None:
        tensors, quantization = _keep_codes(model, parameters, tensors, row, dtype)
    with atomic_directory(path, marker=CONFIG_FILE) as directory:
        write_hf_files(
            tensors,
            directory,
            arch=model.spec.arch,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            companions=companions,
            quantization=quantization,
            stem=row.stem,
        )


def _keep_codes(
    model: CausalLM,
    parameters: Mapping[str, Any],
    tensors: Sequence[LazyTensor],
    row: CheckpointFormat,
    dtype: torch.dtype,
) -> tuple[list[LazyTensor], dict[str, Any]]:
    """The tensors with quantized weights in their parts, and config.json's quantization_config."""
    assert row.pack is not None
    assert row.quantization is not None
    weights = {name: p for name, p in parameters.items() if format_of(p) is not None}
    check_types([weight.format for weight in weights.values()], row)
    written: list[LazyTensor] = []
    for tensor in tensors:
        weight = weights.get(tensor.name)
        written += [tensor] if weight is None else lazy_parts(tensor.name, weight, row.pack)
    linears = [hf_name(slot) for slot in linear_slots(model.spec.arch)]
    left = [name for name in linears if f"{name}.weight" not in weights]
    return written, row.quantization(list(weights.values()), left, dtype)


def written_format(format: str) -> CheckpointFormat:
    """
    Raises:
        CheckpointError: for a format that is not written.
    """
    written = [name for name, row in FORMATS.items() if row.is_written]
    if format not in written:
        raise CheckpointError(f"format is {format!r}{did_you_mean(format, written)}")
    return FORMATS[format]


def check_types(formats: Collection[Format], row: CheckpointFormat) -> None:
    """
    Raises:
        CheckpointError: if a model with weights in these formats has none that such a checkpoint
            keeps, or some that it cannot hold.
    """
    if not formats:
        kind = "quantized" if row.types is None else f"in {', '.join(row.types).upper()}"
        raise CheckpointError(f"format is {row.name!r}, but no weight is {kind}; write it as 'hf'")
    others = sorted({one.name for one in formats} - {*(row.types or [])})
    if others and row.types is not None:
        raise CheckpointError(
            f"format is {row.name!r}, but the model has weights in {', '.join(others)}; write it "
            "as 'native', or as 'hf'"
        )


def lazy_parameter(name: str, parameter: Tensor, dtype: torch.dtype | None) -> LazyTensor:
    out_dtype = parameter.dtype if dtype is None else dtype

    def load() -> Tensor:
        return plain(parameter).detach().to(out_dtype)

    return LazyTensor(name, parameter.shape, out_dtype, load)


def _main_dtype(tensors: Sequence[LazyTensor]) -> torch.dtype:
    """config.json names one dtype: that of the largest tensor, where parameters differ."""
    return max(tensors, key=lambda tensor: tensor.nbytes).dtype


def write_hf_files(
    tensors: Sequence[LazyTensor],
    directory: Path,
    *,
    arch: LlamaArch,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    companions: str | Path | None,
    quantization: dict[str, Any] | None = None,
    stem: str = STEM,
) -> None:
    """config.json, weights, index and tokenizer files, into a folder that is there.

    Args:
        dtype: for config.json; None is that of the largest tensor.
        quantization: config.json's `quantization_config`.
        stem: of the weight files' names.
    """
    config = config_from_arch(arch, dtype or _main_dtype(tensors))
    if companions is not None:
        source = Path(companions)
        # what says nothing about the weights (token ids and the like) stays as it is there; both
        # spellings of a key that transformers renamed go, or it would read the stale one
        stale = ("dtype", "rope_parameters", "quantization_config")
        if (source / CONFIG_FILE).is_file():
            original = read_config(source)
            config = {k: v for k, v in original.items() if k not in stale} | config
        for name in _COMPANIONS:
            if (source / name).is_file():
                shutil.copyfile(source / name, directory / name)
    if quantization is not None:
        config["quantization_config"] = quantization
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    write_shards(tensors, directory, max_shard_bytes=max_shard_bytes, stem=stem)
