"""QLoRA fine-tuning of Llama models from component builders.

The public names are loaded when they are first used, so that importing the package (and
`qlora --help`) does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_builders.checkpoint import (
        load_adapter,
        load_checkpoint,
        merge_adapter,
        save_adapter,
        save_checkpoint,
    )
    from qlora_builders.models import LLAMA_ARCHS, ComponentRule, LlamaArch
    from qlora_builders.models.llama import llama
    from qlora_builders.modules import FrozenNF4Linear, LoRALinear, quantize_
    from qlora_builders.tensor import NF4Tensor, linear_nf4, to_nf4

__version__ = "0.1.0"

_HOMES = {
    "checkpoint": (
        "load_adapter",
        "load_checkpoint",
        "merge_adapter",
        "save_adapter",
        "save_checkpoint",
    ),
    "models": ("LLAMA_ARCHS", "ComponentRule", "LlamaArch", "llama"),
    "modules": ("FrozenNF4Linear", "LoRALinear", "quantize_"),
    "tensor": ("NF4Tensor", "linear_nf4", "to_nf4"),
}

__all__ = [
    "LLAMA_ARCHS",
    "ComponentRule",
    "FrozenNF4Linear",
    "LlamaArch",
    "LoRALinear",
    "NF4Tensor",
    "linear_nf4",
    "llama",
    "load_adapter",
    "load_checkpoint",
    "merge_adapter",
    "quantize_",
    "save_adapter",
    "save_checkpoint",
    "to_nf4",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
