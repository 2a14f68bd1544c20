"""The formats of base weights, one reader each: detection, architecture, and tensors by name.

Every reader gives Hugging Face names; what is behind a name is read when it is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qlora_builders.checkpoint.bnb_4bit import QUANT_METHOD as BNB_METHOD
from qlora_builders.checkpoint.bnb_4bit import check_quantization_config, read_bnb
from qlora_builders.checkpoint.hf_config import arch_from_config, read_config
from qlora_builders.checkpoint.meta_llama import PARAMS_FILE, read_meta, read_meta_arch
from qlora_builders.checkpoint.native import QUANT_METHODS, read_native
from qlora_builders.checkpoint.tensor_files import LazyTensor, open_tensors
from qlora_builders.errors import CheckpointError, did_you_mean
from qlora_builders.models import ComponentRule, LlamaArch

AUTO = "auto"


class Reader(NamedTuple):
    arch: Callable[[Path], LlamaArch]
    tensors: Callable[[Path], dict[str, LazyTensor]]


def _config_arch(directory: Path) -> LlamaArch:
    return arch_from_config(read_config(directory), source=str(directory / "config.json"))


READERS = {
    "hf": Reader(_config_arch, open_tensors),
    "bnb-4bit": Reader(_config_arch, read_bnb),
    **{n: Reader(_config_arch, partial(read_native, format=n)) for n in QUANT_METHODS.values()},
    "meta": Reader(read_meta_arch, read_meta),
}


def detect_format(directory: Path) -> str:
    """The key in `READERS` of what lies in a directory.

    Raises:
        CheckpointError: if nothing there can be read.
    """
    file = directory / "config.json"
    if not file.is_file() and (directory / PARAMS_FILE).is_file():
        return "meta"
    quantization = read_config(directory).get("quantization_config")
    if quantization is None:
        return "hf"
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if isinstance(method, str) and method in QUANT_METHODS:
        _check_version(quantization, file)
        return QUANT_METHODS[method]
    if method != BNB_METHOD:
        raise CheckpointError(
            f"{file}: the weights are quantized in a way that cannot be read (quant_method "
            f"{method!r}); allowed: {BNB_METHOD}, {', '.join(QUANT_METHODS)}, or 16- or 32-bit "
            "weights"
        )
    check_quantization_config(quantization, file)
    return "bnb-4bit"


def _check_version(quantization: dict[str, Any], file: Path) -> None:
    if quantization.get("version") != 1:
        raise CheckpointError(
            f"{file}: version {quantization.get('version')!r} of "
            f"{quantization['quant_method']}; "
            "this release reads version 1"
        )


def get_reader(directory: Path, format: str = AUTO) -> Reader:
    """
    Raises:
        CheckpointError: for an unknown format, one that contradicts config.json, or no directory.
    """
    if format not in (AUTO, *READERS):
        raise CheckpointError(f"format is {format!r}{did_you_mean(format, (AUTO, *READERS))}")
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory; give a local checkpoint directory")
    if format == "meta":
        return READERS["meta"]
    found = detect_format(directory)
    if format not in (AUTO, found):
        raise CheckpointError(f"{directory}: format is {format!r}, but the directory is {found!r}")
    return READERS[found]


def read_arch(path: str | Path, *, format: str = AUTO) -> LlamaArch:
    """The arch that a checkpoint directory describes, of any format.

    Raises:
        CheckpointError: for a missing file, another model family, or something unsupported.
    """
    path = Path(path)
    return get_reader(path, format).arch(path)


def read_tensors(path: str | Path, *, format: str = AUTO) -> dict[str, LazyTensor]:
    """Hugging Face name -> lazy tensor, of any format; files are checked, weights not yet read.

    Raises:
        CheckpointError: if the directory or one of its files cannot be read.
    """
    path = Path(path)
    tensors = get_reader(path, format).tensors(path)
    # rotary frequencies that old writers stored; they follow from the arch
    return {name: t for name, t in tensors.items() if not name.endswith(".inv_freq")}


def stored_plan(path: str | Path, *, format: str = AUTO) -> list[dict[str, Any]]:
    """The component rules that keep quantized weights as a directory stores them; none for plain
    ones."""
    slots = {
        name.removesuffix(".weight").removeprefix("model."): tensor.quantized
        for name, tensor in read_tensors(path, format=format).items()
        if tensor.quantized
    }
    return [ComponentRule(match=slot, base=base).spelled for slot, base in slots.items()]


def stored_dtype(path: str | Path, *, format: str = AUTO) -> torch.dtype:
    """That of the largest weight; bfloat16 for one that no computation takes, such as float8."""
    tensors = read_tensors(path, format=format).values()
    dtype = max(tensors, key=lambda tensor: tensor.shape.numel()).dtype
    return dtype if dtype in (torch.float32, torch.float16) else torch.bfloat16
