"""The formats of base weights, a row each, and what a directory holds.

Every row gives Hugging Face names; what is behind a name is read when it is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qlora_builders.checkpoint.formats.hf import CONFIG_FILE, HF, CheckpointFormat, read_config
from qlora_builders.checkpoint.formats.meta import META
from qlora_builders.checkpoint.formats.quantized import BNB_4BIT, NATIVE, NF4
from qlora_builders.checkpoint.tensor_files import LazyTensor
from qlora_builders.errors import CheckpointError, did_you_mean
from qlora_builders.models import ComponentRule, LlamaArch, slot_name

AUTO = "auto"
# the first that fits is what a directory holds
FORMATS = {row.name: row for row in (HF, BNB_4BIT, NF4, NATIVE, META)}


def detect_format(directory: Path) -> str:
    """The key in `FORMATS` of what lies in a directory.

    Raises:
        CheckpointError: if nothing there can be read.
    """
    others = [row for row in FORMATS.values() if row.marker != CONFIG_FILE]
    file = directory / CONFIG_FILE
    for row in others:
        if not file.is_file() and (directory / row.marker).is_file():
            return row.name
    config = read_config(directory).get("quantization_config")
    if config is None:
        return HF.name
    method = config.get("quant_method") if isinstance(config, dict) else None
    methods = {row.quant_method: row for row in FORMATS.values() if row.quant_method}
    if not isinstance(method, str) or method not in methods:
        raise CheckpointError(
            f"{file}: the weights are quantized in a way that cannot be read (quant_method "
            f"{method!r}); allowed: {', '.join(map(str, methods))}, or 16- or 32-bit weights"
        )
    methods[method].check(config, file)
    return methods[method].name


def get_format(directory: Path, format: str = AUTO) -> CheckpointFormat:
    """
    Raises:
        CheckpointError: for an unknown format, one that contradicts config.json, or no directory.
    """
    if format not in (AUTO, *FORMATS):
        raise CheckpointError(f"format is {format!r}{did_you_mean(format, (AUTO, *FORMATS))}")
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory; give a local checkpoint directory")
    if format != AUTO and FORMATS[format].marker != CONFIG_FILE:
        return FORMATS[format]
    found = detect_format(directory)
    if format not in (AUTO, found):
        raise CheckpointError(f"{directory}: format is {format!r}, but the directory is {found!r}")
    return FORMATS[found]


def read_arch(path: str | Path, *, format: str = AUTO) -> LlamaArch:
    """The arch that a checkpoint directory describes, of any format.

    Raises:
        CheckpointError: for a missing file, another model family, or something unsupported.
    """
    path = Path(path)
    return get_format(path, format).arch(path)


def read_tensors(path: str | Path, *, format: str = AUTO) -> dict[str, LazyTensor]:
    """Hugging Face name -> lazy tensor, of any format; files are checked, weights not yet read.

    Raises:
        CheckpointError: if the directory or one of its files cannot be read.
    """
    path = Path(path)
    tensors = get_format(path, format).tensors(path)
    # rotary frequencies that old writers stored; they follow from the arch
    return {name: t for name, t in tensors.items() if not name.endswith(".inv_freq")}


def stored_plan(path: str | Path, *, format: str = AUTO) -> list[dict[str, Any]]:
    """The component rules that keep quantized weights as a directory stores them; none for plain
    ones."""
    slots = {
        slot_name(name): tensor.quantized
        for name, tensor in read_tensors(path, format=format).items()
        if tensor.quantized
    }
    return [ComponentRule(match=slot, base=base).spelled for slot, base in slots.items()]


def stored_dtype(path: str | Path, *, format: str = AUTO) -> torch.dtype:
    """That of the largest weight; bfloat16 for one that no computation takes, such as float8."""
    tensors = read_tensors(path, format=format).values()
    dtype = max(tensors, key=lambda tensor: tensor.shape.numel()).dtype
    return dtype if dtype in (torch.float32, torch.float16) else torch.bfloat16
