"""Our own directories of quantized weights: codes and scales as they are in memory.

    config.json        as of a Hugging Face checkpoint, and
                       "quantization_config": {"quant_method": ..., "version": 1}
    STEM.safetensors   or STEM-00001-of-0000N.safetensors with STEM.safetensors.index.json

Where all quantized weights are in NF4 the method is `qlora_builders_nf4` and the stem `nf4`;
`qlora_builders_native` and `native` serve every type and any mix of them. The name of the weight
files keeps other tools from loading what they would not understand. For every quantized weight the
file holds the parts of the native layout in `tensor/layouts.py`; all other tensors lie beside them
as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from qlora_builders.checkpoint.tensor_files import LazyTensor, open_tensors
from qlora_builders.errors import CheckpointError
from qlora_builders.tensor import QuantizedTensor
from qlora_builders.tensor.layouts import (
    Stored,
    native_metadata,
    native_suffixes,
    pack_native,
    unpack_native,
)

_SMALL_BYTES = 2**16
# format -> its files' stem
STEMS = {"nf4": "nf4", "native": "native"}
QUANTIZATION_CONFIGS = {
    name: {"quant_method": f"qlora_builders_{name}", "version": 1} for name in STEMS
}
QUANT_METHODS = {str(config["quant_method"]): n for n, config in QUANTIZATION_CONFIGS.items()}


def read_native(directory: Path, *, format: str) -> dict[str, LazyTensor]:
    """
    Raises:
        CheckpointError: for a file that cannot be read, or a weight that is not as documented.
    """
    stored = open_tensors(directory, stem=STEMS[format], mappable=True)
    types = {suffix: cls.kernels.format_type.name for suffix, cls in native_suffixes().items()}
    return collect_weights(stored, types, native_metadata, unpack_native)


def native_parts(name: str, weight: QuantizedTensor) -> Iterator[LazyTensor]:
    return lazy_parts(name, weight, pack_native)


# ---- for every layout of quantized weights -----------------------------------------------------


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
