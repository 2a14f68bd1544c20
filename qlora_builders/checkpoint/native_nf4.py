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
QUANTIZATION_CONFIG = {"quant_method": QUANT_METHOD, "version": 1}


def read_native(directory: Path) -> dict[str, LazyTensor]:
    """
    Raises:
        CheckpointError: for a file that cannot be read, or a weight that is not as documented.
    """
    return collect_weights(
        open_tensors(directory, stem=STEM), NATIVE_JSON, native_metadata, unpack_native
    )


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
    weights: dict[str, dict[str, LazyTensor]] = {
        name.removesuffix(json_suffix): {} for name in tensors if name.endswith(json_suffix)
    }
    found = {}
    for name, tensor in tensors.items():
        module, dot_weight, suffix = name.partition(".weight")
        key = module + dot_weight
        if key in weights:
            weights[key][suffix] = tensor
        else:
            found[name] = tensor
    for key, parts in weights.items():
        text = parts[json_suffix]
        try:
            head = metadata(text.load())
        except ValueError as error:
            raise CheckpointError(f"{text.source}: {text.name}: {error}") from error
        load = partial(_load, key, parts, unpack)
        found[key] = LazyTensor(key, head["shape"], head["dtype"], load, text.source, True)
    return found


def _load(
    key: str,
    parts: Mapping[str, LazyTensor],
    unpack: Callable[[Mapping[str, Tensor]], NF4Tensor],
) -> NF4Tensor:
    tensors = {suffix: part.load() for suffix, part in parts.items()}
    try:
        return unpack(tensors)
    except ValueError as error:
        sources = sorted({str(part.source) for part in parts.values()})
        raise CheckpointError(f"{', '.join(sources)}: {key}: {error}") from error


def lazy_parts(
    name: str, weight: NF4Tensor, pack: Callable[[NF4Tensor], dict[str, Tensor]]
) -> Iterator[LazyTensor]:
    """The parts of a weight to be written. Those that packing computes are computed when written:
    for a whole model they would add up."""
    for suffix, part in pack(weight).items():
        load = partial(_part, weight, pack, suffix)
        yield LazyTensor(name + suffix, part.shape, part.dtype, load)


def _part(weight: NF4Tensor, pack: Callable[[NF4Tensor], dict[str, Tensor]], suffix: str) -> Tensor:
    return pack(weight)[suffix]
