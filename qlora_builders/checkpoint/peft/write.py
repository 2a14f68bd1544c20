"""Adapters out, as PEFT reads them.

Tensor names are ours with the prefix `base_model.model.`, because modules carry Hugging Face's
names and adapters PEFT's. Ranks and alphas that differ between modules are written as
`rank_pattern` and `alpha_pattern`; parameters trained beside the adapters (norms, embedding, plain
linear slots) as `modules_to_save`. A third file, `qlora_base.json`, which PEFT ignores, records the
base: see `base_record`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_builders.checkpoint.base_record import BASE_FILE, base_record
from qlora_builders.checkpoint.peft.config import CONFIG_FILE
from qlora_builders.checkpoint.tensor_files import write_tensors
from qlora_builders.errors import CheckpointError
from qlora_builders.files.folders import atomic_directory
from qlora_builders.modules import CausalLM, LoRALinear, TokenEmbedding, is_adapter

PREFIX = "base_model.model."
WEIGHTS_FILE = "adapter_model.safetensors"
# whole rows, [tokens, hidden]; a tied head has no tensor of its own
TOKEN_ROWS = "model.embed_tokens.token_adapter.trainable_tokens_delta"
MAGNITUDE = "lora_magnitude_vector"  # DoRA's, [out]; without `.weight` in every version of PEFT


@dataclass(frozen=True)
class AdapterFiles:
    """What an adapter directory holds.

    Attributes:
        config: adapter_config.json.
        base: qlora_base.json.
        tensors: adapter_model.safetensors; the model's own memory, as far as it has them so.
    """

    config: dict[str, Any]
    base: dict[str, Any]
    tensors: dict[str, Tensor]


def save_adapter(model: CausalLM, path: str | Path, *, base_model: str = "") -> None:
    """Write everything that trains, in PEFT's layout. The base is neither read nor upcast.

    Args:
        base_model: name or path of the base checkpoint, for `base_model_name_or_path`.

    Raises:
        CheckpointError: if the model has no adapter, or `path` cannot be written.
    """
    adapter = collect_adapter(model, base_model=base_model)
    with atomic_directory(path, marker=CONFIG_FILE) as directory:
        write_adapter_files(adapter, directory)


def write_adapter_files(adapter: AdapterFiles, directory: Path) -> None:
    """Into a folder that is there."""
    (directory / CONFIG_FILE).write_text(json.dumps(adapter.config, indent=2) + "\n")
    (directory / BASE_FILE).write_text(json.dumps(adapter.base, indent=2) + "\n")
    write_tensors(adapter.tensors, directory / WEIGHTS_FILE)


def collect_adapter(model: CausalLM, *, base_model: str = "") -> AdapterFiles:
    """What `save_adapter` writes.

    Raises:
        CheckpointError: if the model has no adapter.
    """
    adapters = adapters_of(model)
    if not adapters:
        raise CheckpointError("the model has no LoRALinear; write it with save_checkpoint instead")
    saved = trained_parameters(model)
    config = _peft_config(model, adapters, saved, base_model)
    tensors = {
        f"{PREFIX}{name}.{part}.weight": factor
        for name, module in adapters.items()
        for part, factor in zip(("lora_A", "lora_B"), module.stored_factors(), strict=True)
    }
    if config.get("lora_bias"):
        for name, module in adapters.items():
            bias = module.lora_B.bias
            if bias is None:  # PEFT has one switch for all modules
                bias = torch.zeros(module.out_features)
            tensors[f"{PREFIX}{name}.lora_B.bias"] = bias
    for name, module in adapters.items():
        if module.lora_magnitude_vector is not None:
            tensors[f"{PREFIX}{name}.{MAGNITUDE}"] = module.lora_magnitude_vector
    embedding = model.model.embed_tokens
    if isinstance(embedding, TokenEmbedding):
        tensors[PREFIX + TOKEN_ROWS] = embedding.token_adapter.trainable_tokens_delta
        config["trainable_token_indices"] = list(embedding.token_adapter.tokens)
    # cloned, because a tied head is the embedding and safetensors refuses to write memory twice
    tensors |= {PREFIX + name: parameter.detach().clone() for name, parameter in saved.items()}
    return AdapterFiles(config, base_record(model), tensors)


def _peft_config(
    model: nn.Module, adapters: dict[str, LoRALinear], saved: Iterable[str], base_model: str
) -> dict[str, Any]:
    """With the keys that PEFT has known since 0.6, the first to have rank_pattern; the newer
    `use_rslora`, `use_dora` and `lora_bias` only where they are needed."""
    # PEFT has one use_rslora for all modules; where they differ, alpha * sqrt(rank) without it
    # gives the same scaling
    rslora = all(module.use_rslora for module in adapters.values())
    alphas = {
        name: module.stored_alpha * math.sqrt(module.stored_rank)
        if module.use_rslora and not rslora
        else module.stored_alpha
        for name, module in adapters.items()
    }
    ranks = {name: module.stored_rank for name, module in adapters.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    dropouts = [getattr(module.dropout, "p", 0.0) for module in adapters.values()]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": max(dropouts),
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "target_modules": _target_modules(model, set(adapters)),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in saved}) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    newer = {
        "use_rslora": rslora,
        "use_dora": any(m.lora_magnitude_vector is not None for m in adapters.values()),
        "lora_bias": any(module.lora_B.bias is not None for module in adapters.values()),
    }
    return config | {key: True for key, needed in newer.items() if needed}


def _target_modules(model: nn.Module, adapted: set[str]) -> list[str]:
    """Bare names (`q_proj`) where they select exactly the adapted modules, else full ones."""
    suffixes = {name.rpartition(".")[2] for name in adapted}
    selected = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in suffixes}
    return sorted(suffixes if selected == adapted else adapted)


def adapters_of(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that train beside the adapters. A tied head is listed beside the embedding: PEFT
    does not tie what it saves."""
    return {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.requires_grad and not is_adapter(name)
    }
