"""Builders: arch rows, component plans, and the Llama assembled from both."""

from qlora_builders.models.components import ComponentRule, resolve
from qlora_builders.models.llama import LlamaSpec, linear_slots, llama, other_modules
from qlora_builders.models.llama_archs import LLAMA_ARCHS, LlamaArch, RopeScaling, get_arch

__all__ = [
    "LLAMA_ARCHS",
    "ComponentRule",
    "LlamaArch",
    "LlamaSpec",
    "RopeScaling",
    "get_arch",
    "linear_slots",
    "llama",
    "other_modules",
    "resolve",
]
