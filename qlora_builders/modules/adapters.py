"""A model without its adapters, for a while: the base that they were added to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from qlora_builders.modules.lora import LoRALinear


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Inside, every `LoRALinear` of `model` computes as its base does; nothing is copied or moved.

    Nested uses are fine, and an error inside leaves the adapters as they were before.
    """
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    before = [layer.adapter_enabled for layer in layers]
    try:
        for layer in layers:
            layer.adapter_enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.adapter_enabled = enabled
