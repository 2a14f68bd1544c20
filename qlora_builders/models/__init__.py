"""Builders: arch rows, component plans, and the Llama assembled from both."""

from qlora_builders.models.components import ComponentRule, resolve
from qlora_builders.models.families import (
    FAMILIES,
    LLAMA_ARCHS,
    LlamaArch,
    RopeScaling,
    family_config,
    get_arch,
)
from qlora_builders.models.generation import check_prompt, generate, generate_batch, max_steps
from qlora_builders.models.llama import (
    BaseCheckpoint,
    LlamaSpec,
    hf_name,
    layer_slots,
    linear_slots,
    llama,
    other_modules,
    slot_name,
)
from qlora_builders.models.summary import SummaryRow, summarize

__all__ = [
    "FAMILIES",
    "LLAMA_ARCHS",
    "BaseCheckpoint",
    "ComponentRule",
    "LlamaArch",
    "LlamaSpec",
    "RopeScaling",
    "SummaryRow",
    "check_prompt",
    "family_config",
    "generate",
    "generate_batch",
    "get_arch",
    "hf_name",
    "layer_slots",
    "linear_slots",
    "llama",
    "max_steps",
    "other_modules",
    "resolve",
    "slot_name",
    "summarize",
]
