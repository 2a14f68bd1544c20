"""Directories that hold weights quantized: our own, and bitsandbytes'; in and out, bit for bit.

config.json is as of a Hugging Face checkpoint, with a "quantization_config" that says which of them
it is. For every quantized weight the files hold the parts that `tensor/layouts.py` describes; all
other tensors lie beside them as usual. Three formats:

    nf4       quant_method `qlora_builders_nf4`, version 1; files `nf4.safetensors`, or shards with
              `nf4.safetensors.index.json`. Codes and scales as they are in memory, all of NF4. The
              name of the files keeps other tools from loading what they would not understand.
    native    `qlora_builders_native` and `native.safetensors`: the same for every type and any mix.
    bnb-4bit  what transformers and bitsandbytes (which is not needed) write with `load_in_4bit`.
              FP4 and 8-bit weights are not read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_builders.checkpoint.formats.hf import CheckpointFormat, Key, config_arch, read_keys
from qlora_builders.checkpoint.tensor_files import LazyTensor, open_tensors
from qlora_builders.errors import CheckpointError
from qlora_builders.tensor import NF4Tensor, QuantizedTensor
from qlora_builders.tensor.layouts import (
    BNB_FP4_JSON,
    BNB_JSON,
    Stored,
    bnb_metadata,
    native_metadata,
    native_suffixes,
    pack_bnb,
    pack_native,
    unpack_bnb,
    unpack_native,
)

_Unpack = Callable[[Mapping[str, Tensor]], QuantizedTensor]
_SMALL_BYTES = 2**16


def _collect(
    tensors: Mapping[str, LazyTensor],
    types: Mapping[str, str],
    metadata: Callable[[Tensor, str], Stored],
    unpack: _Unpack,
) -> dict[str, LazyTensor]:
    """One lazy weight for the parts of each; tensors that belong to none stay as they are.

    Args:
        types: suffix of a JSON part -> type of the weight that it describes.
    """
    # model.norm.weight.scales -> (model.norm, .weight, .scales)
    split = {name: name.partition(".weight") for name in tensors}
    described = {m + w: suffix for m, w, suffix in split.values() if suffix in types}
    parts: dict[str, dict[str, LazyTensor]] = {key: {} for key in described}
    found = {}
    for name, (module, dot_weight, suffix) in split.items():
        if module + dot_weight in parts:
            parts[module + dot_weight][suffix] = tensors[name]
        else:
            found[name] = tensors[name]
    for key, suffix in described.items():
        text = parts[key][suffix]
        content = text.load()
        try:
            stored = metadata(content, suffix)
        except ValueError as error:
            raise CheckpointError(f"{text.source}: {text.name}: {error}") from error
        load = partial(_load, key, parts[key], unpack)
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


def _load(
    key: str, parts: Mapping[str, LazyTensor], unpack: _Unpack, *, mapped: bool = False
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


# ---- our own -------------------------------------------------------------------------------------

_VERSION = 1


def _native(name: str, types: tuple[str, ...] | None) -> CheckpointFormat:
    config: dict[str, Any] = {"quant_method": f"qlora_builders_{name}", "version": _VERSION}

    def read(directory: Path) -> dict[str, LazyTensor]:
        stored = open_tensors(directory, stem=name, mappable=True)
        kinds = {key: cls.kernels.format_type.name for key, cls in native_suffixes().items()}
        return _collect(stored, kinds, native_metadata, unpack_native)

    def check(found: dict[str, Any], source: Path) -> None:
        if found.get("version") != _VERSION:
            raise CheckpointError(
                f"{source}: version {found.get('version')!r} of {found['quant_method']}; "
                f"this release reads version {_VERSION}"
            )

    return CheckpointFormat(
        name=name,
        arch=config_arch,
        tensors=read,
        quant_method=config["quant_method"],
        check=check,
        pack=pack_native,
        types=types,
        quantization=lambda weights, plain, dtype: config,
        stem=name,
    )


NF4 = _native("nf4", ("nf4",))
NATIVE = _native("native", None)

# ---- bitsandbytes' -------------------------------------------------------------------------------

_FLAGS = ("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit")
_KEYS = {flag: Key(field=flag, kind=bool, default=False, null=True) for flag in _FLAGS}
_KEYS["bnb_4bit_quant_type"] = Key(field="bnb_4bit_quant_type", kind=str, default="fp4")
_ONLY_NF4 = (
    "of bitsandbytes' formats only 4-bit NF4 is read (load_in_4bit, bnb_4bit_quant_type='nf4')"
)


def _read_bnb(directory: Path) -> dict[str, LazyTensor]:
    tensors = open_tensors(directory)
    for name, tensor in tensors.items():
        if name.endswith(BNB_FP4_JSON):
            weight = name.removesuffix(BNB_FP4_JSON)
            raise CheckpointError(f"{tensor.source}: {weight} is quantized to FP4; {_ONLY_NF4}")
    return _collect(tensors, {BNB_JSON: "nf4"}, bnb_metadata, unpack_bnb)


def _check_bnb(config: dict[str, Any], source: Path) -> None:
    values = read_keys(_KEYS, config, f"{source}: quantization_config")
    eight_bit = values["load_in_8bit"] or values["_load_in_8bit"]
    four_bit = values["load_in_4bit"] or values["_load_in_4bit"]
    if eight_bit or not four_bit:
        kind = "8-bit" if eight_bit else "not 4-bit"
        raise CheckpointError(f"{source}: the weights are {kind}; {_ONLY_NF4}")
    quant_type = values["bnb_4bit_quant_type"]
    if quant_type != "nf4":
        raise CheckpointError(f"{source}: bnb_4bit_quant_type is {quant_type!r}; {_ONLY_NF4}")


def _bnb_config(
    weights: Sequence[NF4Tensor], plain_modules: Sequence[str], dtype: torch.dtype
) -> dict[str, Any]:
    """What makes transformers read the directory; `dtype` is what the layers compute in there."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": any(w.format.scale_format == "bnb" for w in weights),
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": list(plain_modules),
        "llm_int8_threshold": 6.0,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }


BNB_4BIT = CheckpointFormat(
    name="bnb-4bit",
    arch=config_arch,
    tensors=_read_bnb,
    quant_method="bitsandbytes",
    check=_check_bnb,
    pack=pack_bnb,
    types=("nf4",),
    quantization=_bnb_config,
)
