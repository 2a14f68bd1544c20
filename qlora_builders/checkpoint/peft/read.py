"""PEFT adapter directories, read strictly.

A directory holds `adapter_config.json` and `adapter_model.safetensors`; the layout is described in
`write.py`. Config, file and model must agree in every module: PEFT loads what happens to fit and
leaves the rest of the model as it was.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_builders.checkpoint.base_record import (
    ASPECTS,
    BASE_FILE,
    BaseRecord,
    check_base,
    read_base_record,
)
from qlora_builders.checkpoint.peft.config import (
    CONFIG_FILE,
    AdapterModule,
    PeftConfig,
    read_peft_config,
)
from qlora_builders.checkpoint.peft.write import (
    MAGNITUDE,
    PREFIX,
    TOKEN_ROWS,
    WEIGHTS_FILE,
    adapters_of,
    trained_parameters,
)
from qlora_builders.checkpoint.tensor_files import (
    LazyTensor,
    is_finite,
    open_tensors,
    read_header,
)
from qlora_builders.errors import CheckpointError, did_you_mean, listed
from qlora_builders.models import ComponentRule, hf_name, linear_slots, slot_name
from qlora_builders.modules import CausalLM, LoRALinear, TokenEmbedding
from qlora_builders.tensor.sharded import copy_whole_

QUANTIZE = ("auto", "nf4", "none")
NF4_BASE = {"match": "layers.**", "kind": "frozen_nf4"}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter directory says, before any model exists.

    Attributes:
        config: what of adapter_config.json selects modules.
        modules: Hugging Face module name -> its adapter.
        saved: plain parameters trained beside the adapters, by Hugging Face name.
        base: `qlora_base.json`, or None for an adapter that another tool wrote.
        copies: tensors in the file -> parameters of the base they must equal. PEFT writes the base
            weight of an adapted head, and the embedding where asked to.
        tensors: of the file, by their names there.
    """

    path: Path
    config: PeftConfig
    modules: dict[str, AdapterModule]
    saved: tuple[str, ...]
    base: BaseRecord | None
    copies: dict[str, str]
    tensors: dict[str, LazyTensor]


def read_adapter(path: str | Path) -> AdapterInfo:
    """
    Raises:
        CheckpointError: for a missing or unreadable file, a feature we do not have, keys with
            another prefix, lora_A / lora_B that do not make a pair, dtypes that are no weights', a
            rank that contradicts the config, or config entries that the file contradicts.
    """
    path = Path(path)
    config = read_peft_config(path)
    file = path / WEIGHTS_FILE
    read_header(file)  # says what is wrong with the file, if anything
    header = {
        # as files have it that were made from a state_dict of PEFT's
        re.sub(rf"(?<=\.{MAGNITUDE})\.weight$", "", key): tensor
        for key, tensor in open_tensors(path, stem=WEIGHTS_FILE.partition(".")[0]).items()
    }
    foreign = sorted(name for name in header if not name.startswith(PREFIX))
    if foreign:
        raise CheckpointError(
            f"{file}: keys must begin with {PREFIX!r}, but these do not: {listed(foreign)}"
        )
    parts: dict[str, dict[str, list[int]]] = {}
    plain = []
    for key, tensor in header.items():
        name = key.removeprefix(PREFIX)
        if tensor.dtype not in _DTYPES:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            raise CheckpointError(f"{file}: {name} has dtype {tensor.dtype}; allowed: {allowed}")
        match = re.fullmatch(rf"(.+)\.(lora_[AB]\.weight|lora_B\.bias|{MAGNITUDE})", name)
        if match is None:
            plain.append(name)
        else:
            parts.setdefault(match[1], {})[match[2]] = list(tensor.shape)
    if (TOKEN_ROWS in plain) != bool(config.tokens):
        raise CheckpointError(
            f"{file}: {TOKEN_ROWS} is {'there' if TOKEN_ROWS in plain else 'missing'}, but "
            f"trainable_token_indices of {CONFIG_FILE} is {config.tokens}"
        )
    plain = [name for name in plain if name != TOKEN_ROWS]
    if not parts:
        raise CheckpointError(f"{file}: holds no lora_A and lora_B ({len(header)} tensors)")
    ranks, alphas = config.ranks(parts), config.alphas(parts)
    modules = {
        name: _adapter_module(file, config, name, own, ranks[name], alphas[name])
        for name, own in sorted(parts.items())
    }
    saved, copies = _plain_tensors(file, plain, modules, config)
    config.check_entries(modules, {name.rpartition(".")[0] for name in saved})
    return AdapterInfo(path, config, modules, tuple(saved), read_base_record(path), copies, header)


def _adapter_module(
    file: Path,
    config: PeftConfig,
    name: str,
    shapes: dict[str, list[int]],
    rank: int,
    alpha: float,
) -> AdapterModule:
    """lora_A is [rank, in], lora_B [out, rank], the bias of lora_B and the magnitudes [out]."""
    a, b = shapes.get("lora_A.weight", []), shapes.get("lora_B.weight", [])
    if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        raise CheckpointError(
            f"{file}: {name} needs lora_A [rank, in] and lora_B [out, rank], got "
            f"lora_A {a or 'none'} and lora_B {b or 'none'}"
        )
    for leaf, option in (("lora_B.bias", "lora_bias"), (MAGNITUDE, "use_dora")):
        shape, wanted = shapes.get(leaf), getattr(config, option)
        if shape != ([b[0]] if wanted else None):
            raise CheckpointError(
                f"{file}: {name}.{leaf} is {shape or 'missing'}, but {CONFIG_FILE} says "
                f"{option}={wanted}" + (f", so [{b[0]}]" if wanted else "")
            )
    if a[0] != rank:
        raise CheckpointError(f"{file}: {name} has rank {a[0]}, but {CONFIG_FILE} says {rank}")
    return AdapterModule(rank, alpha, config.use_rslora, config.lora_bias, config.use_dora)


def _plain_tensors(
    file: Path, names: list[str], modules: Iterable[str], config: PeftConfig
) -> tuple[list[str], dict[str, str]]:
    """The tensors that are no adapter: (parameters that were trained, copies of the base)."""
    possible = {f"{module}.base_layer.weight": f"{module}.weight" for module in modules}
    possible |= {name: name for name in ("model.embed_tokens.weight", "lm_head.weight")}
    saved, copies, stray = [], {}, []
    for name in sorted(names):
        if config.saves(name.rpartition(".")[0]):
            saved.append(name)
        elif name in possible:
            copies[name] = possible[name]
        else:
            stray.append(name)
    if stray:
        raise CheckpointError(
            f"{file}: neither lora_A, lora_B nor in modules_to_save of {CONFIG_FILE}: "
            f"{listed(stray)}"
        )
    return saved, copies


def load_adapter(model: CausalLM, path: str | Path, *, allow_base_mismatch: bool = False) -> None:
    """Load an adapter directory into a model whose plan fits it; see `adapter_plan`.

    Args:
        allow_base_mismatch: load it although the adapter was trained on other weights, another
            quantization or another dtype. Adapters that other tools wrote record none of these.

    Raises:
        CheckpointError: with sorted lists, for another base, adapters missing in the file or in
            the model, ranks, scalings or shapes that differ, or values that are not finite.
    """
    load_adapter_info(model, read_adapter(path), () if allow_base_mismatch else ASPECTS)


def load_adapter_info(model: CausalLM, info: AdapterInfo, aspects: Collection[str]) -> None:
    """`load_adapter` of a directory that was read, comparing only these `aspects` of the base."""
    if info.base is not None:
        check_base(info.base, model, info.path, aspects)
    adapters = adapters_of(model)
    _check_complete(model, info)
    _compare_names(info, "adapters", set(info.modules), set(adapters))
    _compare_names(info, "parameters", set(info.saved), set(trained_parameters(model)))
    differing = [
        f"{name} (file: rank {own.rank}, scaling {own.scaling:g}; "
        f"model: rank {adapters[name].stored_rank}, scaling {adapters[name].scaling:g})"
        for name, own in info.modules.items()
        if own.rank != adapters[name].stored_rank
        or not math.isclose(own.scaling, adapters[name].scaling)
    ]
    if differing:
        raise CheckpointError(f"{info.path}: rank or alpha differ: {listed(differing)}")
    dora = {name for name, module in adapters.items() if module.lora_magnitude_vector is not None}
    _compare_names(info, "DoRA magnitudes", {n for n in info.modules if info.config.use_dora}, dora)
    _check_copies(model, info)
    table = model.model.embed_tokens
    rows = table.token_adapter.tokens if isinstance(table, TokenEmbedding) else ()
    if info.config.tokens != list(rows):
        raise CheckpointError(
            f"{info.path}: trains the rows of tokens {info.config.tokens}, the model those of "
            f"{list(rows)}"
        )
    names = [f"{name}.{MAGNITUDE}" for name in sorted(dora)] + _lora_biases(info, adapters)
    tensors = _read_factors(info, adapters)
    for name in (*names, *info.saved, *([TOKEN_ROWS] if rows else [])):
        tensors[name] = _read_fitting(info, name, model.get_parameter(name).shape)
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    tied = model.tie_word_embeddings and head in tensors
    if tied and not torch.equal(tensors[head], tensors[embedding]):
        raise CheckpointError(
            f"{info.path}: lm_head and embed_tokens differ, but the model ties them"
        )
    for name, tensor in tensors.items():
        copy_whole_(model.get_parameter(name), tensor)


def _check_complete(model: CausalLM, info: AdapterInfo) -> None:
    """What the config selects in this model must be in the file, whatever the model's plan is."""
    targets = info.config.targeted([hf_name(slot) for slot in linear_slots(model.spec.arch)])
    saved = {
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        if info.config.saves(name)
        for leaf, _ in module.named_parameters(recurse=False)
    }
    missing = sorted((targets - set(info.modules)) | (saved - set(info.saved)))
    if missing:
        raise CheckpointError(
            f"{info.path / WEIGHTS_FILE}: lacks what {CONFIG_FILE} selects: {listed(missing)}"
        )


def _lora_biases(info: AdapterInfo, adapters: dict[str, LoRALinear]) -> list[str]:
    """Names of the biases to load. Where only some modules have one, the file has zeros for the
    others, because PEFT has one switch for all."""
    names = []
    for name, own in info.modules.items():
        key = f"{name}.lora_B.bias"
        if adapters[name].lora_B.bias is not None:
            if not own.lora_bias:
                raise CheckpointError(f"{info.path}: no {key}, but the model has lora_bias there")
            names.append(key)
        elif own.lora_bias and info.tensors[PREFIX + key].load().any():
            raise CheckpointError(
                f"{info.path}: {key} is not zero, but the model has no lora_bias there"
            )
    return names


def _read_factors(info: AdapterInfo, adapters: dict[str, LoRALinear]) -> dict[str, Tensor]:
    """A and B by parameter name, in two where the second half is the frozen start of PiSSA."""
    tensors = {}
    for name, module in adapters.items():
        a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        tensors[a] = _read_fitting(info, a, (module.stored_rank, module.in_features))
        tensors[b] = _read_fitting(info, b, (module.out_features, module.stored_rank))
        if module.lora_A_init is not None:
            tensors[a], tensors[f"{name}.lora_A_init"] = tensors[a].chunk(2)
            tensors[b], negative = tensors[b].chunk(2, dim=1)
            tensors[f"{name}.lora_B_init"] = -negative
    return tensors


def _read_fitting(info: AdapterInfo, name: str, shape: Sequence[int]) -> Tensor:
    tensor = info.tensors[PREFIX + name].load()
    if list(tensor.shape) != list(shape):
        raise CheckpointError(
            f"{info.path / WEIGHTS_FILE}: {name} has shape {list(tensor.shape)}; "
            f"the model needs {list(shape)}"
        )
    if not is_finite(tensor):
        raise CheckpointError(f"{info.path / WEIGHTS_FILE}: {name} holds NaN or infinity")
    return tensor


def _check_copies(model: nn.Module, info: AdapterInfo) -> None:
    """A copy of a base weight that differs from ours was trained, or belongs to another base."""
    for name, parameter_name in info.copies.items():
        copy = info.tensors[PREFIX + name].load()
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


# ---- the model that it needs ---------------------------------------------------------------------


def check_quantize(quantize: str) -> None:
    if quantize not in QUANTIZE:
        raise CheckpointError(f"quantize is {quantize!r}{did_you_mean(quantize, QUANTIZE)}")


def adapter_plan(
    info: AdapterInfo, *, quantize: str = "auto"
) -> tuple[list[ComponentRule | dict[str, Any]], list[str]]:
    """(components, train) for a model that the adapter fits.

    Args:
        quantize: "auto" is the plan recorded with the adapter, or "none" where another tool wrote
            it; "nf4" stores the decoder's linear layers in NF4; "none" keeps 16 or 32 bits.

    Raises:
        CheckpointError: for another `quantize`.
    """
    check_quantize(quantize)
    if quantize == "auto" and info.base is not None:
        return list(info.base.components), list(info.base.train)
    nf4 = quantize == "nf4"
    components: list[ComponentRule | dict[str, Any]] = [dict(NF4_BASE)] if nf4 else []
    for name, adapter in info.modules.items():
        slot = slot_name(name)
        kind = "qlora" if nf4 and slot.startswith("layers.") else "lora"
        rule = {"match": slot, "kind": kind, "rank": adapter.rank, "alpha": adapter.alpha}
        rule |= {"use_rslora": adapter.use_rslora}
        switches = {"lora_bias": adapter.lora_bias, "use_dora": adapter.use_dora}
        components.append(rule | {name: True for name, on in switches.items() if on})
    train = []
    for name in sorted({slot_name(saved.rpartition(".")[0]) for saved in info.saved}):
        if name.endswith("_proj") or name == "lm_head":
            components.append({"match": name, "kind": "linear", "trainable": True})
        else:
            train.append(name)
    if info.config.tokens:
        train.append(f"embed_tokens[{','.join(map(str, info.config.tokens))}]")
    return components, train


def check_plan(info: AdapterInfo, plan: dict[str, ComponentRule]) -> None:
    """A record whose plan is not that of the weights beside it, before anything is allocated."""
    planned = {
        hf_name(slot): (rule.stored_rank, bool(rule.use_dora))
        for slot, rule in plan.items()
        if rule.rank is not None
    }
    stored = {name: (module.rank, module.use_dora) for name, module in info.modules.items()}
    differing = sorted(
        name for name in planned.keys() | stored if planned.get(name) != stored.get(name)
    )
    if differing:
        raise CheckpointError(
            f"{info.path}: {BASE_FILE} plans other adapters, ranks or use_dora than "
            f"{WEIGHTS_FILE} holds: {listed(differing)}"
        )
