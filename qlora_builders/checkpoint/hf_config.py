"""A Hugging Face config.json <-> `LlamaArch`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from qlora_builders.errors import CheckpointError
from qlora_builders.models import LlamaArch, RopeScaling

# config.json key -> LlamaArch field, where a required number is copied as it is
_REQUIRED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
}
# config.json key -> (LlamaArch field, transformers' default for LlamaConfig)
_OPTIONAL: dict[str, tuple[str, Any]] = {
    "max_position_embeddings": ("max_position_embeddings", 2048),
    "rms_norm_eps": ("norm_eps", 1e-6),
    "hidden_act": ("hidden_act", "silu"),
    "attention_bias": ("attention_bias", False),
    "attention_dropout": ("attention_dropout", 0.0),
    "mlp_bias": ("mlp_bias", False),
    "tie_word_embeddings": ("tie_word_embeddings", False),
}
# rope type -> what it needs, under the same name in config.json and in RopeScaling
_ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


def read_config(directory: Path) -> dict[str, Any]:
    """
    Raises:
        CheckpointError: if config.json is missing or not JSON.
    """
    file = directory / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{file}: missing; expected a Hugging Face checkpoint directory")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: holds {type(config).__name__}, expected an object")
    return config


def read_arch(directory: str | Path) -> LlamaArch:
    """The arch that a checkpoint directory's config.json describes.

    Raises:
        CheckpointError: for a missing file, another model family, or something unsupported.
    """
    directory = Path(directory)
    return arch_from_config(read_config(directory), source=str(directory / "config.json"))


def arch_from_config(config: dict[str, Any], *, source: str = "config.json") -> LlamaArch:
    """Both spellings of transformers are read: `rope_theta` + `rope_scaling`, `rope_parameters`."""
    family = config.get("model_type", "llama")
    if family != "llama":
        raise CheckpointError(f"{source}: model_type is {family!r}; only 'llama' is supported")
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise CheckpointError(
            f"{source}: the checkpoint is quantized already (quant_method {method!r}); "
            "use one with 16- or 32-bit weights"
        )
    missing = sorted(set(_REQUIRED) - set(config))
    if missing:
        raise CheckpointError(f"{source}: missing keys: {', '.join(missing)}")
    values = {field: config[key] for key, field in _REQUIRED.items()}
    for key, (field, default) in _OPTIONAL.items():
        values[field] = config.get(key, default)
    values["num_kv_heads"] = config.get("num_key_value_heads") or values["num_heads"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    try:
        values["head_dim"] = config.get("head_dim") or values["hidden_size"] // values["num_heads"]
        values["rope_theta"] = float(rope.get("rope_theta", config.get("rope_theta", 10_000.0)))
        values["rope_scaling"] = _rope_scaling(rope, source)
        return LlamaArch(**values)
    except CheckpointError:
        raise
    except (ValueError, TypeError, ZeroDivisionError, AttributeError) as error:
        raise CheckpointError(f"{source}: {error}") from error


def _rope_scaling(rope: dict[str, Any], source: str) -> RopeScaling | None:
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "default":
        return None
    if rope_type not in _ROPE_KEYS:
        raise CheckpointError(
            f"{source}: rope type {rope_type!r} is not supported; "
            f"allowed: default, {', '.join(_ROPE_KEYS)}"
        )
    keys = _ROPE_KEYS[rope_type]
    missing = [key for key in keys if key not in rope]
    if missing:
        raise CheckpointError(f"{source}: rope type {rope_type!r} needs {', '.join(missing)}")
    return RopeScaling(rope_type=rope_type, **{key: rope[key] for key in keys})


def config_from_arch(arch: LlamaArch, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a model of this arch, readable by transformers 4 and 5."""
    dtype_name = str(dtype).removeprefix("torch.")
    config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    config |= {key: getattr(arch, field) for key, field in _REQUIRED.items()}
    config |= {key: getattr(arch, field) for key, (field, _) in _OPTIONAL.items()}
    config |= {
        "num_key_value_heads": arch.num_kv_heads,
        "head_dim": arch.head_dim,
        "rope_theta": arch.rope_theta,
        "rope_scaling": None,
        "torch_dtype": dtype_name,
    }
    scaling = arch.rope_scaling
    if scaling is not None:
        keys = _ROPE_KEYS[scaling.rope_type]
        config["rope_scaling"] = {"rope_type": scaling.rope_type}
        config["rope_scaling"] |= {key: getattr(scaling, key) for key in keys}
    return config
