"""PEFT adapter directories in and out, strictly.

A directory holds `adapter_config.json` and `adapter_model.safetensors`. Tensor names are ours with
the prefix `base_model.model.`, because modules carry Hugging Face's names and adapters PEFT's.
Ranks and alphas that differ between modules are written as `rank_pattern` and `alpha_pattern`;
parameters trained beside the adapters (norms, embedding, plain linear slots) as `modules_to_save`.
Only keys that every PEFT version knows are written. A third file, `qlora_base.json`, which PEFT
ignores, records the component plan that the adapter was trained under.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_builders.checkpoint.safetensors_io import (
    atomic_directory,
    listed,
    read_tensor,
    tensor_names,
    write_tensors,
)
from qlora_builders.errors import CheckpointError
from qlora_builders.modules import CausalLM, LoRALinear

PREFIX = "base_model.model."
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
BASE_FILE = "qlora_base.json"

# adapter_config.json keys that change the function computed, with the values we can honour
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
}


@dataclass(frozen=True)
class AdapterModule:
    """The adapter of one linear slot."""

    rank: int
    alpha: float
    use_rslora: bool = False

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter directory says, before any model exists.

    Attributes:
        modules: Hugging Face module name -> its adapter.
        saved: plain parameters trained beside the adapters, by Hugging Face name.
        base: `qlora_base.json`, or None for an adapter that another tool wrote.
    """

    path: Path
    modules: dict[str, AdapterModule]
    saved: tuple[str, ...]
    base: dict[str, Any] | None


# ---- out ----------------------------------------------------------------------------------------


def save_adapter(model: CausalLM, path: str | Path, *, base_model: str = "") -> None:
    """Write everything that trains, in PEFT's layout. The base is neither read nor upcast.

    Args:
        base_model: name or path of the base checkpoint, for `base_model_name_or_path`.

    Raises:
        CheckpointError: if the model has no adapter.
    """
    adapters = _adapters(model)
    if not adapters:
        raise CheckpointError("the model has no LoRALinear; write it with save_checkpoint instead")
    saved = _trained_parameters(model)
    tensors = {
        f"{PREFIX}{name}.{part}.weight": getattr(module, part).weight
        for name, module in adapters.items()
        for part in ("lora_A", "lora_B")
    }
    tensors |= {PREFIX + name: parameter for name, parameter in saved.items()}
    config = _peft_config(model, adapters, list(saved), base_model)
    base = {
        "components": [
            {"match": rule.match, "kind": rule.kind, **rule.options}
            for rule in model.spec.components
        ],
        "train": list(model.spec.train),
    }
    with atomic_directory(path) as directory:
        (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        (directory / BASE_FILE).write_text(json.dumps(base, indent=2) + "\n")
        write_tensors(tensors, directory / WEIGHTS_FILE)


def _peft_config(
    model: nn.Module, adapters: dict[str, LoRALinear], saved: list[str], base_model: str
) -> dict[str, Any]:
    # PEFT has one use_rslora for all modules; where they differ, alpha * sqrt(rank) without it
    # gives the same scaling
    rslora = all(module.use_rslora for module in adapters.values())
    alphas = {
        name: module.alpha if rslora else module.scaling * module.rank
        for name, module in adapters.items()
    }
    ranks = {name: module.rank for name, module in adapters.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    dropouts = [getattr(module.dropout, "p", 0.0) for module in adapters.values()]
    modules_to_save = sorted({name.rpartition(".")[0] for name in saved})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": max(dropouts),
        "use_rslora": rslora,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "target_modules": _target_modules(model, set(adapters)),
        "modules_to_save": modules_to_save or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _target_modules(model: nn.Module, adapted: set[str]) -> list[str]:
    """Bare names (`q_proj`) where they select exactly the adapted modules, else full ones."""
    suffixes = {name.rpartition(".")[2] for name in adapted}
    selected = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in suffixes}
    return sorted(suffixes if selected == adapted else adapted)


# ---- in -----------------------------------------------------------------------------------------


def read_adapter(path: str | Path) -> AdapterInfo:
    """
    Raises:
        CheckpointError: for a missing file, a feature we do not have, keys with another prefix or
            an unpaired lora_A / lora_B, or a rank that contradicts the config.
    """
    path = Path(path)
    config = _read_json(path / CONFIG_FILE)
    if config.get("peft_type", "LORA") != "LORA":
        raise CheckpointError(f"{path}: peft_type is {config['peft_type']!r}; only LORA is read")
    for key, allowed in _UNSUPPORTED.items():
        if config.get(key) not in allowed:
            raise CheckpointError(f"{path / CONFIG_FILE}: {key}={config[key]!r} is not supported")
    file = path / WEIGHTS_FILE
    names = tensor_names(file)
    foreign = sorted(name for name in names if not name.startswith(PREFIX))
    if foreign:
        raise CheckpointError(
            f"{file}: keys must begin with {PREFIX!r}, but these do not: {listed(foreign)}"
        )
    ranks: dict[str, dict[str, int]] = {}
    saved = []
    for name in names:
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name.removeprefix(PREFIX))
        if match is None:
            saved.append(name.removeprefix(PREFIX))
            continue
        dim = 0 if match[2] == "A" else 1  # lora_A [rank, in], lora_B [out, rank]
        ranks.setdefault(match[1], {})[match[2]] = read_tensor(file, name).shape[dim]
    _check_saved(file, saved, config.get("modules_to_save") or [])
    modules = {name: _adapter_module(file, config, name, r) for name, r in sorted(ranks.items())}
    base_file = path / BASE_FILE
    base = _read_json(base_file) if base_file.is_file() else None
    return AdapterInfo(path, modules, tuple(sorted(saved)), base)


def _adapter_module(
    file: Path, config: dict[str, Any], name: str, ranks: dict[str, int]
) -> AdapterModule:
    if set(ranks) != {"A", "B"} or ranks["A"] != ranks["B"]:
        raise CheckpointError(f"{file}: {name} needs lora_A and lora_B of one rank, got {ranks}")
    rank = _pattern_value(config.get("rank_pattern"), name, config["r"])
    if ranks["A"] != rank:
        raise CheckpointError(
            f"{file}: {name} has rank {ranks['A']}, but {CONFIG_FILE} says {rank}"
        )
    alpha = _pattern_value(config.get("alpha_pattern"), name, config["lora_alpha"])
    return AdapterModule(rank, alpha, bool(config.get("use_rslora")))


def _pattern_value(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule: the first key that matches a suffix of whole segments, as a regex."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def _check_saved(file: Path, saved: list[str], modules_to_save: list[str]) -> None:
    stray = [n for n in saved if not n.rpartition(".")[0].endswith(tuple(modules_to_save))]
    if stray:
        raise CheckpointError(
            f"{file}: neither lora_A, lora_B nor in modules_to_save: {listed(sorted(stray))}"
        )


def adapter_plan(info: AdapterInfo, *, base: str = "auto") -> tuple[list[dict], list[str]]:
    """(components, train) for a model that the adapter fits.

    Args:
        base: "auto" is the plan recorded with the adapter, or "plain" where none is; "nf4" stores
            the decoder's linear layers in NF4; "plain" leaves the base in its 16 or 32 bits.
    """
    if base == "auto" and info.base is not None:
        return info.base["components"], info.base["train"]
    nf4 = base == "nf4"
    components: list[dict] = [{"match": "layers.**", "kind": "frozen_nf4"}] if nf4 else []
    for name, adapter in info.modules.items():
        slot = name.removeprefix("model.")
        kind = "qlora" if nf4 and slot.startswith("layers.") else "lora"
        rule = {"match": slot, "kind": kind, "rank": adapter.rank, "alpha": adapter.alpha}
        components.append(rule | {"use_rslora": adapter.use_rslora})
    train = []
    for name in sorted({saved.rpartition(".")[0].removeprefix("model.") for saved in info.saved}):
        if name.endswith("_proj") or name == "lm_head":
            components.append({"match": name, "kind": "linear", "trainable": True})
        else:
            train.append(name)
    return components, train


def load_adapter(model: CausalLM, path: str | Path) -> None:
    """Load an adapter directory into a model whose plan fits it; see `adapter_plan`.

    Raises:
        CheckpointError: with sorted lists, for adapters missing in the file or in the model, ranks,
            scalings or shapes that differ, or a parameter that cannot be loaded.
    """
    info = read_adapter(path)
    adapters = _adapters(model)
    _compare_names(info, "adapters", set(info.modules), set(adapters))
    _compare_names(info, "parameters", set(info.saved), set(_trained_parameters(model)))
    differing = [
        f"{name} (file: rank {own.rank}, scaling {own.scaling:g}; "
        f"model: rank {adapters[name].rank}, scaling {adapters[name].scaling:g})"
        for name, own in info.modules.items()
        if own.rank != adapters[name].rank or not math.isclose(own.scaling, adapters[name].scaling)
    ]
    if differing:
        raise CheckpointError(f"{info.path}: rank or alpha differ: {listed(differing)}")
    names = [f"{m}.{part}.weight" for m in info.modules for part in ("lora_A", "lora_B")]
    with torch.no_grad():
        for name in [*names, *info.saved]:
            parameter = model.get_parameter(name)
            tensor = read_tensor(info.path / WEIGHTS_FILE, PREFIX + name)
            if tensor.shape != parameter.shape:
                raise CheckpointError(
                    f"{info.path / WEIGHTS_FILE}: {name} has shape {list(tensor.shape)}; "
                    f"the model needs {list(parameter.shape)}"
                )
            parameter.copy_(tensor)


def _compare_names(info: AdapterInfo, what: str, in_file: set[str], in_model: set[str]) -> None:
    missing, extra = sorted(in_model - in_file), sorted(in_file - in_model)
    if missing or extra:
        raise CheckpointError(
            f"{info.path}: {what} of the model that are not in the file: {listed(missing)}; "
            f"in the file but not in the model: {listed(extra)}"
        )


def _adapters(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def _trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that train beside the adapters."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ".lora_A." not in name and ".lora_B." not in name
    }


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise CheckpointError(f"{file}: missing; expected a PEFT adapter directory")
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds {type(content).__name__}, expected an object")
    return content
