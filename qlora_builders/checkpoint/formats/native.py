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

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from qlora_builders.checkpoint.formats.base import CheckpointFormat, collect_weights, lazy_parts
from qlora_builders.checkpoint.formats.hf import config_arch
from qlora_builders.checkpoint.tensor_files import LazyTensor, open_tensors
from qlora_builders.errors import CheckpointError
from qlora_builders.tensor import QuantizedTensor
from qlora_builders.tensor.layouts import (
    native_metadata,
    native_suffixes,
    pack_native,
    unpack_native,
)

_VERSION = 1


def _read(directory: Path, *, stem: str) -> dict[str, LazyTensor]:
    """
    Raises:
        CheckpointError: for a file that cannot be read, or a weight that is not as documented.
    """
    stored = open_tensors(directory, stem=stem, mappable=True)
    types = {suffix: cls.kernels.format_type.name for suffix, cls in native_suffixes().items()}
    return collect_weights(stored, types, native_metadata, unpack_native)


def _parts(name: str, weight: QuantizedTensor) -> Iterator[LazyTensor]:
    return lazy_parts(name, weight, pack_native)


def _check(config: dict[str, Any], source: Path) -> None:
    if config.get("version") != _VERSION:
        raise CheckpointError(
            f"{source}: version {config.get('version')!r} of {config['quant_method']}; "
            f"this release reads version {_VERSION}"
        )


def _format(name: str, types: tuple[str, ...] | None) -> CheckpointFormat:
    method = f"qlora_builders_{name}"
    config = {"quant_method": method, "version": _VERSION}
    return CheckpointFormat(
        name=name,
        arch=config_arch,
        tensors=partial(_read, stem=name),
        quant_method=method,
        check=_check,
        parts=_parts,
        types=types,
        quantization=lambda weights, plain, dtype: config,
        stem=name,
    )


NF4 = _format("nf4", ("nf4",))
NATIVE = _format("native", None)
