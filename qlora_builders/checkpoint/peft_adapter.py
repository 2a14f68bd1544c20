"""PEFT adapter directories in and out, strictly.

A directory holds `adapter_config.json` and `adapter_model.safetensors`. Tensor names are ours with
the prefix `base_model.model.`, because modules carry Hugging Face's names and adapters PEFT's.
Ranks and alphas that differ between modules are written as `rank_pattern` and `alpha_pattern`;
parameters trained beside the adapters (norms, embedding, plain linear slots) as `modules_to_save`.
Only keys that every PEFT version knows are written. A third file, `qlora_base.json`, which PEFT
ignores, records the component plan and dtype of the base that the adapter was trained on.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
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
from qlora_builders.tensor.sharded import copy_whole_

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
    "kasa_config": (None,),
    # other values (pissa, olora, corda, loftq ...) also change the base weights
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
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
        copies: tensors in the file -> parameters of the base they must equal. PEFT writes the base
            weight of an adapted head, and the embedding where asked to.
    """

    path: Path
    modules: dict[str, AdapterModule]
    saved: tuple[str, ...]
    base: dict[str, Any] | None
    copies: dict[str, str]


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
    # cloned, because a tied head is the embedding and safetensors refuses to write memory twice
    tensors |= {PREFIX + name: parameter.detach().clone() for name, parameter in saved.items()}
    config = _peft_config(model, adapters, list(saved), base_model)
    base = {
        "components": [
            {"match": rule.match, "kind": rule.kind, **rule.options}
            for rule in model.spec.components
        ],
        "train": list(model.spec.train),
        "dtype": str(model.spec.dtype).removeprefix("torch."),
    }
    with atomic_directory(path, marker=CONFIG_FILE) as directory:
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
        name: module.alpha * math.sqrt(module.rank)
        if module.use_rslora and not rslora
        else module.alpha
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
            lora_A / lora_B that do not make a pair, or a rank that contradicts the config.
    """
    path = Path(path)
    config = _read_json(path / CONFIG_FILE)
    if config.get("peft_type", "LORA") != "LORA":
        raise CheckpointError(f"{path}: peft_type is {config['peft_type']!r}; only LORA is read")
    for key, allowed in _UNSUPPORTED.items():
        if config.get(key) not in allowed:
            raise CheckpointError(f"{path / CONFIG_FILE}: {key}={config[key]!r} is not supported")
    for key in ("r", "lora_alpha"):
        if key not in config:
            raise CheckpointError(f"{path / CONFIG_FILE}: {key} missing")
    file = path / WEIGHTS_FILE
    names = tensor_names(file)
    foreign = sorted(name for name in names if not name.startswith(PREFIX))
    if foreign:
        raise CheckpointError(
            f"{file}: keys must begin with {PREFIX!r}, but these do not: {listed(foreign)}"
        )
    shapes: dict[str, dict[str, list[int]]] = {}
    plain = []
    for name in (name.removeprefix(PREFIX) for name in names):
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        if match is None:
            plain.append(name)
        else:
            shape = list(read_tensor(file, PREFIX + name).shape)
            shapes.setdefault(match[1], {})[match[2]] = shape
    modules = {name: _adapter_module(file, config, name, s) for name, s in sorted(shapes.items())}
    saved, copies = _plain_tensors(file, plain, modules, config.get("modules_to_save") or [])
    base_file = path / BASE_FILE
    base = _read_json(base_file) if base_file.is_file() else None
    return AdapterInfo(path, modules, tuple(saved), base, copies)


def _adapter_module(
    file: Path, config: dict[str, Any], name: str, shapes: dict[str, list[int]]
) -> AdapterModule:
    """lora_A is [rank, in], lora_B [out, rank]."""
    a, b = shapes.get("A", []), shapes.get("B", [])
    if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        raise CheckpointError(
            f"{file}: {name} needs lora_A [rank, in] and lora_B [out, rank], got "
            f"lora_A {a or 'none'} and lora_B {b or 'none'}"
        )
    rank = _pattern_value(config.get("rank_pattern"), name, config["r"])
    if a[0] != rank:
        raise CheckpointError(f"{file}: {name} has rank {a[0]}, but {CONFIG_FILE} says {rank}")
    alpha = _pattern_value(config.get("alpha_pattern"), name, config["lora_alpha"])
    return AdapterModule(rank, alpha, bool(config.get("use_rslora")))


def _pattern_value(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule: the first key that matches a suffix of whole segments, as a regex."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def _plain_tensors(
    file: Path, names: list[str], modules: Iterable[str], modules_to_save: list[str]
) -> tuple[list[str], dict[str, str]]:
    """The tensors that are no adapter: (parameters that were trained, copies of the base)."""
    possible = {f"{module}.base_layer.weight": f"{module}.weight" for module in modules}
    possible |= {name: name for name in ("model.embed_tokens.weight", "lm_head.weight")}
    saved, copies, stray = [], {}, []
    for name in sorted(names):
        if name.rpartition(".")[0].endswith(tuple(modules_to_save)):
            saved.append(name)
        elif name in possible:
            copies[name] = possible[name]
        else:
            stray.append(name)
    if stray:
        raise CheckpointError(
            f"{file}: neither lora_A, lora_B nor in modules_to_save: {listed(stray)}"
        )
    return saved, copies


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
    _check_copies(model, info)
    names = [f"{m}.{part}.weight" for m in info.modules for part in ("lora_A", "lora_B")]
    tensors = {name: _read_fitting(model, info, name) for name in (*names, *info.saved)}
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    tied = model.tie_word_embeddings and head in tensors
    if tied and not torch.equal(tensors[head], tensors[embedding]):
        raise CheckpointError(
            f"{info.path}: lm_head and embed_tokens differ, but the model ties them"
        )
    for name, tensor in tensors.items():
        copy_whole_(model.get_parameter(name), tensor)


def _read_fitting(model: nn.Module, info: AdapterInfo, name: str) -> Tensor:
    parameter = model.get_parameter(name)
    tensor = read_tensor(info.path / WEIGHTS_FILE, PREFIX + name)
    if tensor.shape != parameter.shape:
        raise CheckpointError(
            f"{info.path / WEIGHTS_FILE}: {name} has shape {list(tensor.shape)}; "
            f"the model needs {list(parameter.shape)}"
        )
    return tensor


def _check_copies(model: nn.Module, info: AdapterInfo) -> None:
    """A copy of a base weight that differs from ours was trained, or belongs to another base."""
    for name, parameter_name in info.copies.items():
        copy = read_tensor(info.path / WEIGHTS_FILE, PREFIX + name)
        own = model.get_parameter(parameter_name)
        if copy.shape != own.shape or not torch.equal(copy.to(own), own):
            raise CheckpointError(
                f"{info.path / WEIGHTS_FILE}: {name} differs from {parameter_name} of the model; "
                "is this the base the adapter was trained on?"
            )


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
    """Parameters that train beside the adapters. A tied head is listed beside the embedding: PEFT
    does not tie what it saves."""
    return {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
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
