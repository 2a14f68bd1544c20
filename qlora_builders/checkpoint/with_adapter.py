"""The model that an adapter needs: its plan, and base and adapter loaded as one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qlora_builders.checkpoint.base_record import ASPECTS, BASE_FILE
from qlora_builders.checkpoint.formats import AUTO, read_arch, stored_dtype, stored_plan
from qlora_builders.checkpoint.load import load_checkpoint
from qlora_builders.checkpoint.peft.read import AdapterInfo, load_adapter_info, read_adapter
from qlora_builders.checkpoint.peft.write import WEIGHTS_FILE
from qlora_builders.errors import CheckpointError, PlanError, did_you_mean, listed
from qlora_builders.models import ComponentRule, hf_name, linear_slots, resolve, slot_name
from qlora_builders.modules import LOFTQ, CausalLM

QUANTIZE = ("auto", "nf4", "none")
NF4_BASE = {"match": "layers.**", "kind": "frozen_nf4"}


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


def load_with_adapter(
    path: str | Path,
    adapter: str | Path | None,
    *,
    quantize: str = "auto",
    format: str = AUTO,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
    allow_base_mismatch: bool = False,
) -> CausalLM:
    """A checkpoint with its adapter, or the checkpoint alone, in eval mode.

    Args:
        path: the base checkpoint.
        adapter: an adapter directory, or None.
        quantize: as for `adapter_plan`; "auto" without an adapter is as the checkpoint is stored.
        format: of the checkpoint, as for `load_checkpoint`.
        dtype: of the base; None is the one the adapter was trained on, or that of the files.
        device, compute_dtype: as for `load_checkpoint`.
        allow_base_mismatch: as for `load_adapter`. What `quantize` or `dtype` names is the caller's
            choice and not compared anyway.

    Raises:
        CheckpointError: if either cannot be read or they do not fit each other.
    """
    check_quantize(quantize)
    info = None if adapter is None else read_adapter(adapter)
    components: Sequence[ComponentRule | dict[str, Any]]
    if info is not None:
        components, train = adapter_plan(info, quantize=quantize)
    else:
        stored = stored_plan(path, format=format) if quantize == "auto" else []
        components, train = [NF4_BASE] if quantize == "nf4" else stored, []
    recorded = None if info is None or info.base is None else info.base.dtype
    try:
        if info is not None:
            arch = read_arch(path, format=format)
            _check_plan(info, resolve(components, linear_slots(arch)))
        model = load_checkpoint(
            path,
            components,
            format=format,
            train=train,
            device=device,
            dtype=dtype or recorded or stored_dtype(path, format=format),
            compute_dtype=compute_dtype,
        )
    except PlanError as error:  # the caller wrote no plan; the adapter did
        raise CheckpointError(f"{adapter}: the adapter does not fit {path}: {error}") from error
    if info is not None:
        # a LoftQ adapter is half a correction of one quantization, whatever the caller names
        rules = () if info.base is None else info.base.components
        bound = any(rule.init_lora_weights == LOFTQ for rule in rules)
        chosen = {"quantization": quantize != "auto" and not bound, "dtype": dtype is not None}
        aspects = [a for a in ASPECTS if not (allow_base_mismatch or chosen.get(a))]
        load_adapter_info(model, info, aspects)
    return model.eval()


def _check_plan(info: AdapterInfo, plan: dict[str, ComponentRule]) -> None:
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
