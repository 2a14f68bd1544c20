"""A Hugging Face config.json <-> `LlamaArch`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from qlora_builders.errors import CheckpointError
from qlora_builders.files.json_object import read_json_object
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
    return read_json_object(
        directory / "config.json", expected="a Hugging Face checkpoint directory"
    )


def arch_from_config(config: dict[str, Any], *, source: str = "config.json") -> LlamaArch:
    """Both spellings of transformers are read: `rope_theta` + `rope_scaling`, `rope_parameters`."""
    family = config.get("model_type", "llama")
    if family != "llama":
        raise CheckpointError(f"{source}: model_type is {family!r}; only 'llama' is supported")
    missing = sorted(set(_REQUIRED) - set(config))
    if missing:
        raise CheckpointError(f"{source}: missing keys: {', '.join(missing)}")
    values = {field: config[key] for key, field in _REQUIRED.items()}
    for key, (field, default) in _OPTIONAL.items():
        values[field] = _checked(config.get(key, default), default, key, source)
    values["num_kv_heads"] = config.get("num_key_value_heads") or values["num_heads"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    try:
        values["head_dim"] = config.get("head_dim") or values["hidden_size"] // values["num_heads"]
        theta = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
        values["rope_theta"] = _positive(float(theta), "rope_theta", source)
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
    values = {key: _positive(rope[key], key, source) for key in keys}
    if values.get("low_freq_factor") == values.get("high_freq_factor", math.nan):
        raise CheckpointError(f"{source}: low_freq_factor and high_freq_factor must differ")
    return RopeScaling(rope_type=rope_type, **values)


_KINDS = {bool: "true or false", int: "an integer", float: "a number >= 0", str: "a string"}


def _checked(value: Any, default: Any, key: str, source: str) -> Any:
    """Of the type of the default; a whole number is a number too."""
    kind = type(default)
    right = type(value) is kind or (kind is float and type(value) is int)
    if not right or (kind is float and value < 0):
        raise CheckpointError(f"{source}: {key} is {value!r}; expected {_KINDS[kind]}")
    return value


def _positive(value: Any, key: str, source: str) -> Any:
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise CheckpointError(f"{source}: {key} is {value!r}; expected a number > 0")
    return value


def function_keys(arch: LlamaArch) -> dict[str, Any]:
    """What of an arch decides the function of its weights, flat and by the names in config.json.

    Every arch has the same keys. `max_position_embeddings` is none: it bounds rows, and RoPE that
    depends on a length has `original_max_position_embeddings`.
    """
    keys = {key: getattr(arch, field) for key, field in _REQUIRED.items()}
    keys |= {key: getattr(arch, field) for key, (field, _) in _OPTIONAL.items()}
    del keys["max_position_embeddings"]
    keys |= {"num_key_value_heads": arch.num_kv_heads, "head_dim": arch.head_dim}
    scaling = arch.rope_scaling
    rope_type = "default" if scaling is None else scaling.rope_type
    keys |= {"rope_theta": arch.rope_theta, "rope_scaling.rope_type": rope_type}
    for key in _ROPE_KEYS["llama3"]:  # has those of linear too
        used = key in _ROPE_KEYS.get(rope_type, ())
        keys[f"rope_scaling.{key}"] = getattr(scaling, key) if used else None
    return keys


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
