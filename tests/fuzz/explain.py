"""Why a changed file may be read as something else, without a reader being able to notice.

A file without a checksum can be turned into another sound one: a changed byte of a weight, another
learning rate, another row. Each such case has to be explained by one of the rules here: another
reader of the same file (safetensors, torch, tokenizers, jinja2, json, yaml, pyarrow) says exactly
what ours says, in every part that differs from the sound file. There is no rule that takes
whatever comes. Where our own formats have a checksum (NF4 weights, step checkpoints under their
manifest), there is no rule at all.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import good_folders as good
import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from qlora_builders.config.checks import flatten
from qlora_builders.tensor import to_nf4
from qlora_builders.tensor.layouts import BNB_JSON


@dataclass(frozen=True)
class Case:
    """A changed file that was read as something else than the sound one.

    Attributes:
        differing: keys of the summaries whose values are not the same.
    """

    folder: Path
    file: Path
    before: bytes
    after: bytes
    expected: dict[str, Any]
    got: dict[str, Any]
    differing: list[str]


Rule = Callable[[Case], str | None]  # the reason


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if (a.shape, a.dtype, a.layout) != (b.shape, b.dtype, b.layout):
            return False
        a, b = (x.contiguous().flatten().view(torch.uint8) if x.numel() else x for x in (a, b))
        return torch.equal(a, b)  # NaN equals NaN
    return type(a) is type(b) and repr(a) == repr(b)


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    missing = object()
    return sorted(k for k in a.keys() | b.keys() if not same(a.get(k, missing), b.get(k, missing)))


def all_as(case: Case, prefix: str, said: Callable[[str], Any]) -> bool:
    """Everything that differs has this prefix, and the value that `said(name)` gives."""
    return all(
        key.startswith(prefix) and key in case.got and same(case.got[key], said(key[len(prefix) :]))
        for key in case.differing
    )


# ---- weights ------------------------------------------------------------------------------------


def _stored(case: Case) -> dict[str, Tensor]:
    """Every tensor of the folder, as safetensors reads it."""
    found: dict[str, Tensor] = {}
    for file in sorted(case.folder.glob("*.safetensors")):
        found |= load_safetensors(file.read_bytes())
    return found


def values_of_weights(case: Case, *, quantized: bool = False) -> str | None:
    """Plain tensors of the file, cast to the model's dtype; or `quantized` where they would be."""
    stored = _stored(case)

    def said(name: str) -> Tensor:
        weight = stored[name].to(torch.bfloat16)
        return (
            to_nf4(weight).dequantize() if quantized and name.endswith("_proj.weight") else weight
        )

    return "other values of weights" if all_as(case, "weight:", said) else None


values_of_quantized_weights = partial(values_of_weights, quantized=True)


def values_beside_nf4(case: Case) -> str | None:
    """Plain tensors in a folder of ours; the NF4 weights there have checksums."""
    stored = _stored(case)
    if any(f"{key.removeprefix('weight:')}.nf4" in stored for key in case.differing):
        return None
    return values_of_weights(case)


def values_of_bitsandbytes(case: Case) -> str | None:
    """Codes, scales and offsets have no checksum there; decoded here by their formula."""
    stored = _stored(case)
    for key in case.differing:
        name = key.removeprefix("weight:")
        if key == name or key not in case.got:
            return None
        if name + BNB_JSON in stored:
            parts = {k.removeprefix(name): v for k, v in stored.items() if k.startswith(name)}
            said = _decoded(parts)
        else:
            said = stored[name]
        got = case.got[key].float()
        if got.shape != said.shape or not torch.allclose(got, said.float(), rtol=0.02, atol=1e-30):
            return None
    return "other values of bitsandbytes' parts"


def _decoded(parts: dict[str, Tensor]) -> Tensor:
    state = json.loads(bytes(parts[BNB_JSON].tolist()))
    codes = parts[""].flatten().view(torch.uint8)
    nibbles = torch.stack([codes >> 4, codes & 15], dim=1).flatten()
    scales = parts[".absmax"]
    if ".nested_absmax" in parts:
        groups = parts[".nested_absmax"].repeat_interleave(256)[: scales.numel()]
        scales = parts[".nested_quant_map"][scales.int()] * groups + state["nested_offset"]
    count = math.prod(state["shape"])
    dtype = getattr(torch, state["dtype"])
    spread = scales.repeat_interleave(state["blocksize"])[:count].to(dtype).float()
    return (parts[".quant_map"][nibbles[:count].int()] * spread).view(state["shape"])


def values_of_meta(case: Case) -> str | None:
    """As torch reads the file, rows of heads in Hugging Face's order."""
    stored = torch.load(case.file, weights_only=True, mmap=True)  # without the checksums of a zip

    def said(name: str) -> Tensor:
        weight: Tensor = stored[good.name_of_meta(name)].detach().to(torch.bfloat16)
        if "q_proj" in name or "k_proj" in name:
            pairs = weight.view(-1, good.SIZES["head_dim"] // 2, 2, weight.shape[1])
            weight = pairs.transpose(1, 2).reshape(weight.shape)
        return weight

    return "other values of weights" if all_as(case, "weight:", said) else None


def values_of_adapter(case: Case) -> str | None:
    stored = _stored(case)
    if all_as(case, "weight:", lambda name: stored[f"base_model.model.{name}"].float()):
        return "other values of an adapter"
    return None


def names_of_adapter(case: Case) -> str | None:
    """An adapter without a model: what is saved beside it are the other names in the file."""
    names = (name.removeprefix("base_model.model.") for name in _stored(case))
    said = tuple(sorted(name for name in names if ".lora_" not in name))
    fits = case.differing == ["saved"] and case.got["saved"] == said
    return "another name of a parameter" if fits else None


# ---- what describes weights ---------------------------------------------------------------------


def numbers_of_config(case: Case) -> str | None:
    """What no weight depends on: epsilon, rotary frequencies, positions, activation, dropout."""
    config = json.loads(case.after)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scaling: dict[str, Any] | None = None
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        kind = rope.get("rope_type", rope.get("type"))
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        others = {  # as every type has them
            "attention_factor": None,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": None,
            "mscale_all_dim": None,
            "truncate": True,
            "short_factor": (),
            "long_factor": (),
        }
        default = dict(zip(keys, (None, 1.0, 4.0, 8192), strict=True))
        used = keys[:1] if kind in ("linear", "dynamic") else keys
        scaling = {"rope_type": kind, **default, **{key: rope[key] for key in used}, **others}
    said = {
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "rope_theta": float(rope.get("rope_theta", config.get("rope_theta", 10_000.0))),
        "rope_scaling": scaling,
        "max_position_embeddings": config.get("max_position_embeddings", 2048),
        "attention_dropout": float(config.get("attention_dropout", 0.0)),
        "hidden_act": config.get("hidden_act", "silu"),
    }
    return "another hyperparameter" if all_as(case, "arch.", said.get) else None


def numbers_of_params(case: Case) -> str | None:
    """Meta's: epsilon, rotary base, and the scaling that goes with them."""
    params = json.loads(case.after)
    params = params.get("model", params)
    theta, scaled = float(params.get("rope_theta", 10_000.0)), bool(params.get("use_scaled_rope"))
    said = {
        "norm_eps": float(params["norm_eps"]),
        "rope_theta": theta,
        "rope_scaling": case.expected["arch.rope_scaling"] if scaled else None,
        "max_position_embeddings": 131_072 if scaled else 8192 if theta >= 5e5 else 4096,
    }
    return "another hyperparameter" if all_as(case, "arch.", said.get) else None


def strength_of_adapter(case: Case) -> str | None:
    """Beside an adapter that another tool wrote is no record of its alpha."""
    config = json.loads(case.after)

    def first(key: str, name: str) -> Any:
        patterns = config.get(f"{key}_pattern") or {}
        fits = (v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", name))
        return next(fits, config["r" if key == "rank" else "lora_alpha"])

    def said(name: str) -> float:
        rank = first("rank", name)
        return float(first("alpha", name) / (math.sqrt(rank) if config.get("use_rslora") else rank))

    def close(key: str) -> bool:
        prefix, _, name = key.partition(":")
        return prefix == "scaling" and math.isclose(case.got[key], said(name))

    return "another alpha" if all(map(close, case.differing)) else None


# ---- states of runs -----------------------------------------------------------------------------


def values_of_state(case: Case) -> str | None:
    """As torch reads the file; every value is where it was, and of its type."""
    stored = torch.load(io.BytesIO(case.after), weights_only=True)
    optimizer, generators = stored["optimizer"], stored["random"]

    def said(key: str) -> Any:
        kind, _, name = key.partition(":")
        if kind == "random":
            value = generators[name]
            if name == "cpu":  # which does not give back every bit that it is given
                return torch.Generator().set_state(value).get_state()
            if name != "numpy":
                return value
            return (value[0], value[1].tolist(), *value[2:])
        index, _, leaf = name.partition(".")
        return optimizer["state" if kind == "state" else "param_groups"][int(index)][leaf]

    fits = all(same(case.got.get(key), said(key)) for key in case.differing)
    return "another state of the optimizer or a generator" if fits else None


def what_a_step_says(case: Case) -> str | None:
    said = json.loads(case.after)
    flat = {f"about.{key}": value for key, value in flatten(said).items()} | {"step": said["step"]}
    if type(said["step"]) is int and all(
        same(case.got.get(k), flat.get(k)) for k in case.differing
    ):
        return "another description of a run"
    return None


def values_of_parts(case: Case) -> str | None:
    """Of weights and of the optimizer's state, as safetensors reads them."""
    stored = _stored(replace(case, folder=case.file.parent))

    def said(key: str) -> Tensor:
        kind, _, name = key.partition(":")
        return stored[f"optimizer.{name}" if kind == "state" else name]

    fits = all(key in case.got and same(case.got[key], said(key)) for key in case.differing)
    return "other values of a run's weights or state" if fits else None


def values_of_trained(case: Case) -> str | None:
    """Whole weights or an adapter in a step checkpoint, under a manifest that fits."""
    stored = _stored(replace(case, folder=case.file.parent))

    def said(name: str) -> Tensor:
        like = case.expected[f"weight:{name}"]
        return stored.get(name, stored.get(f"base_model.model.{name}")).to(like.dtype)

    return "other values of what trains" if all_as(case, "weight:", said) else None
