"""Checkpoints and adapters in and out."""

from qlora_builders.checkpoint.formats import read_arch, read_tensors, stored_dtype, stored_plan
from qlora_builders.checkpoint.formats.hf import arch_from_config, config_from_arch
from qlora_builders.checkpoint.load import load_checkpoint, load_with_adapter
from qlora_builders.checkpoint.merge import merge_adapter, save_merged
from qlora_builders.checkpoint.merge_report import MergeError, MergeReport, delta_survival
from qlora_builders.checkpoint.peft.read import adapter_plan, load_adapter, read_adapter
from qlora_builders.checkpoint.peft.write import save_adapter
from qlora_builders.checkpoint.save import save_checkpoint

__all__ = [
    "MergeError",
    "MergeReport",
    "adapter_plan",
    "arch_from_config",
    "config_from_arch",
    "delta_survival",
    "load_adapter",
    "load_checkpoint",
    "load_with_adapter",
    "merge_adapter",
    "read_adapter",
    "read_arch",
    "read_tensors",
    "save_adapter",
    "save_checkpoint",
    "save_merged",
    "stored_dtype",
    "stored_plan",
]
