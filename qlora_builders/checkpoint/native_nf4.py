"""Our own NF4 directories: codes and scales as they are in memory, read back without quantizing.

    config.json        as of a Hugging Face checkpoint, and
                       "quantization_config": {"quant_method": "qlora_builders_nf4", "version": 1}
    nf4.safetensors    or nf4-00001-of-0000N.safetensors with nf4.safetensors.index.json

The name of the weight files keeps other tools from loading what they would not understand. For
every NF4 weight the file holds the parts of the native layout in `tensor/nf4_layouts.py`; all
other tensors lie beside them as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from qlora_builders.checkpoint.safetensors_io import LazyTensor, open_tensors
from qlora_builders.errors import CheckpointError
from qlora_builders.tensor import NF4Tensor
from qlora_builders.tensor.nf4_layouts import (
    NATIVE_JSON,
    native_metadata,
    pack_native,
    unpack_native,
)

STEM = "nf4"
QUANT_METHOD = "qlora_builders_nf4"
_SMALL_BYTES = 2**16
QUANTIZATION_CONFIG = {"quant_method": QUANT_METHOD, "version": 1}


def read_native(directory: Path) -> dict[str, LazyTensor]:
    """
    Raises:
        CheckpointError: for a file that cannot be read, or a weight that is not as documented.
    """
    stored = open_tensors(directory, stem=STEM, mappable=True)
    return collect_weights(stored, NATIVE_JSON, native_metadata, unpack_native)


def native_parts(name: str, weight: NF4Tensor) -> Iterator[LazyTensor]:
    return lazy_parts(name, weight, pack_native)


# ---- for every layout of NF4 weights -----------------------------------------------------------


def collect_weights(
    tensors: Mapping[str, LazyTensor],
    json_suffix: str,
    metadata: Callable[[Tensor], dict[str, Any]],
    unpack: Callable[[Mapping[str, Tensor]], NF4Tensor],
) -> dict[str, LazyTensor]:
    """One lazy NF4 weight for the parts of each; tensors that belong to none stay as they are."""
    parts_of = {name: _split(name) for name in tensors}
    weights: dict[str, dict[str, LazyTensor]] = {
        key: {} for key, suffix in parts_of.values() if suffix == json_suffix
    }
    found = {}
    for name, tensor in tensors.items():
        key, suffix = parts_of[name]
        if key in weights:
            weights[key][suffix] = tensor
        else:
            found[name] = tensor
    for key, parts in weights.items():
        text = parts[json_suffix]
        stored = text.load()
        try:
            head = metadata(stored)
        except ValueError as error:
            raise CheckpointError(f"{text.source}: {text.name}: {error}") from error
        load = partial(_load, key, parts, unpack)
        found[key] = LazyTensor(
            key,
            head["shape"],
            head["dtype"],
            load,
            text.source,
            quantized=True,
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
    unpack: Callable[[Mapping[str, Tensor]], NF4Tensor],
    *,
    mapped: bool = False,
) -> NF4Tensor:
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
    name: str, weight: NF4Tensor, pack: Callable[[NF4Tensor], dict[str, Tensor]]
) -> Iterator[LazyTensor]:
    """The parts of a weight to be written. Large ones that packing computes (decoded scales) are
    computed again when they are written: for a whole model they would add up."""
    memory = {getattr(weight, field).data_ptr() for field in NF4Tensor.tensor_fields}

    def part_again(suffix: str) -> Tensor:
        return pack(weight)[suffix]

    for suffix, part in pack(weight).items():
        is_free = part.nbytes < _SMALL_BYTES or part.data_ptr() in memory
        load = partial(part.view, part.shape) if is_free else partial(part_again, suffix)
        yield LazyTensor(name + suffix, part.shape, part.dtype, load)
