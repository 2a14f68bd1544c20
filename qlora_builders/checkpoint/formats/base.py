"""What a checkpoint format is, one row of the table; and what those of quantized weights share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_builders.checkpoint.tensor_files import STEM, LazyTensor
from qlora_builders.errors import CheckpointError
from qlora_builders.models import LlamaArch
from qlora_builders.tensor import QuantizedTensor
from qlora_builders.tensor.layouts import Stored

CONFIG_FILE = "config.json"
_SMALL_BYTES = 2**16
_Quantization = Callable[[Sequence[Any], Sequence[str], torch.dtype], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class CheckpointFormat:
    """A row of `formats.FORMATS`.

    Attributes:
        arch, tensors: of a directory; tensors have Hugging Face names, and are read when loaded.
        marker: a file that tells such a directory.
        quant_method: config.json's, where several formats have that file; None: not quantized.
        check: raises CheckpointError for a quantization_config of that method which cannot be read.
        is_written: `save_checkpoint` writes it.
        parts: (name, weight) -> what the files hold of a quantized weight; without it such weights
            are written plain.
        types: of quantized weights that it can hold; None: all.
        quantization: (weights, names of plain linears, their dtype) -> quantization_config.
        stem: of the weight files' names.
    """

    name: str
    arch: Callable[[Path], LlamaArch]
    tensors: Callable[[Path], dict[str, LazyTensor]]
    marker: str = CONFIG_FILE
    quant_method: str | None = None
    check: Callable[[dict[str, Any], Path], None] = lambda config, source: None
    is_written: bool = True
    parts: Callable[[str, Any], Iterator[LazyTensor]] | None = None
    types: tuple[str, ...] | None = None
    quantization: _Quantization | None = None
    stem: str = STEM


def collect_weights(
    tensors: Mapping[str, LazyTensor],
    types: Mapping[str, str],
    metadata: Callable[[Tensor, str], Stored],
    unpack: Callable[[Mapping[str, Tensor]], QuantizedTensor],
) -> dict[str, LazyTensor]:
    """One lazy weight for the parts of each; tensors that belong to none stay as they are.

    Args:
        types: suffix of a JSON part -> type of the weight that it describes.
    """
    parts_of = {name: _split(name) for name in tensors}
    described = {key: suffix for key, suffix in parts_of.values() if suffix in types}
    weights: dict[str, dict[str, LazyTensor]] = {key: {} for key in described}
    found = {}
    for name, tensor in tensors.items():
        key, suffix = parts_of[name]
        if key in weights:
            weights[key][suffix] = tensor
        else:
            found[name] = tensor
    for key, parts in weights.items():
        suffix = described[key]
        text = parts[suffix]
        content = text.load()
        try:
            stored = metadata(content, suffix)
        except ValueError as error:
            raise CheckpointError(f"{text.source}: {text.name}: {error}") from error
        load = partial(_load, key, parts, unpack)
        found[key] = LazyTensor(
            key,
            stored.shape,
            stored.dtype,
            load,
            text.source,
            quantized=types[suffix],
            map=partial(load, mapped=True),
        )
    return found


def _split(name: str) -> tuple[str, str]:
    """`model.norm.weight.scales` -> (`model.norm.weight`, `.scales`)"""
    module, dot_weight, suffix = name.partition(".weight")
    return module + dot_weight, suffix


def _load(
    key: str,
    parts: Mapping[str, LazyTensor],
    unpack: Callable[[Mapping[str, Tensor]], QuantizedTensor],
    *,
    mapped: bool = False,
) -> QuantizedTensor:
    """`mapped`: those parts that can be."""
    tensors = {
        suffix: part.map() if mapped and part.map else part.load() for suffix, part in parts.items()
    }
    try:
        return unpack(tensors)
    except ValueError as error:
        sources = sorted({str(part.source) for part in parts.values()})
        raise CheckpointError(f"{', '.join(sources)}: {key}: {error}") from error


def lazy_parts(
    name: str, weight: QuantizedTensor, pack: Callable[[Any], dict[str, Tensor]]
) -> Iterator[LazyTensor]:
    """The parts of a weight to be written. Large ones that packing computes (decoded scales) are
    computed again when they are written: for a whole model they would add up."""
    memory = {field.data_ptr() for field in weight.fields}

    def part_again(suffix: str) -> Tensor:
        return pack(weight)[suffix]

    for suffix, part in pack(weight).items():
        is_free = part.nbytes < _SMALL_BYTES or part.data_ptr() in memory
        load = partial(part.view, part.shape) if is_free else partial(part_again, suffix)
        yield LazyTensor(name + suffix, part.shape, part.dtype, load)
