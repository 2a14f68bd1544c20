"""What transformers and bitsandbytes write with `load_in_4bit`, in and out, bit for bit.

bitsandbytes itself is not needed. The parts of a weight are described in `tensor/layouts.py`;
config.json's `quantization_config` says that there are such weights. FP4 and 8-bit weights are not
read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from qlora_builders.checkpoint.formats.base import CheckpointFormat, collect_weights, lazy_parts
from qlora_builders.checkpoint.formats.hf import Key, config_arch, read_keys
from qlora_builders.checkpoint.tensor_files import LazyTensor, open_tensors
from qlora_builders.errors import CheckpointError
from qlora_builders.tensor import NF4Tensor
from qlora_builders.tensor.layouts import (
    BNB_FP4_JSON,
    BNB_JSON,
    bnb_metadata,
    pack_bnb,
    unpack_bnb,
)

_QUANT_METHOD = "bitsandbytes"
_FLAGS = ("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit")
_KEYS = {flag: Key(field=flag, kind=bool, default=False, null=True) for flag in _FLAGS}
_KEYS["bnb_4bit_quant_type"] = Key(field="bnb_4bit_quant_type", kind=str, default="fp4")
_ONLY_NF4 = (
    "of bitsandbytes' formats only 4-bit NF4 is read (load_in_4bit, bnb_4bit_quant_type='nf4')"
)


def _read(directory: Path) -> dict[str, LazyTensor]:
    """
    Raises:
        CheckpointError: for a file that cannot be read, an FP4 weight, or one that is not as
            bitsandbytes writes it.
    """
    tensors = open_tensors(directory)
    for name, tensor in tensors.items():
        if name.endswith(BNB_FP4_JSON):
            weight = name.removesuffix(BNB_FP4_JSON)
            raise CheckpointError(f"{tensor.source}: {weight} is quantized to FP4; {_ONLY_NF4}")
    return collect_weights(tensors, {BNB_JSON: "nf4"}, bnb_metadata, unpack_bnb)


def _check(config: dict[str, Any], source: Path) -> None:
    """
    Raises:
        CheckpointError: for 8-bit weights or FP4, or a key that holds something else.
    """
    values = read_keys(_KEYS, config, f"{source}: quantization_config")
    eight_bit = values["load_in_8bit"] or values["_load_in_8bit"]
    four_bit = values["load_in_4bit"] or values["_load_in_4bit"]
    if eight_bit or not four_bit:
        kind = "8-bit" if eight_bit else "not 4-bit"
        raise CheckpointError(f"{source}: the weights are {kind}; {_ONLY_NF4}")
    quant_type = values["bnb_4bit_quant_type"]
    if quant_type != "nf4":
        raise CheckpointError(f"{source}: bnb_4bit_quant_type is {quant_type!r}; {_ONLY_NF4}")


def _quantization_config(
    weights: Sequence[NF4Tensor], plain_modules: Sequence[str], dtype: torch.dtype
) -> dict[str, Any]:
    """What makes transformers read the directory.

    Args:
        plain_modules: names of linear layers whose weight is not in NF4.
        dtype: that the layers compute in there.
    """
    return {
        "quant_method": _QUANT_METHOD,
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


def _parts(name: str, weight: NF4Tensor) -> Iterator[LazyTensor]:
    return lazy_parts(name, weight, pack_bnb)


BNB_4BIT = CheckpointFormat(
    name="bnb-4bit",
    arch=config_arch,
    tensors=_read,
    quant_method=_QUANT_METHOD,
    check=_check,
    parts=_parts,
    types=("nf4",),
    quantization=_quantization_config,
)
