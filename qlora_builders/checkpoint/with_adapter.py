"""The model that an adapter needs: its plan, the dtype of its base, and both loaded as one."""

from __future__ import annotations

from pathlib import Path

import torch

from qlora_builders.checkpoint.formats import AUTO, stored_plan
from qlora_builders.checkpoint.load import load_checkpoint
from qlora_builders.checkpoint.peft_adapter import (
    BASE_FILE,
    AdapterInfo,
    load_adapter,
    read_adapter,
)
from qlora_builders.errors import CheckpointError, did_you_mean
from qlora_builders.modules import CausalLM

QUANTIZE = ("auto", "nf4", "none")
NF4_BASE = {"match": "layers.**", "kind": "frozen_nf4"}


def check_quantize(quantize: str) -> None:
    if quantize not in QUANTIZE:
        raise CheckpointError(f"quantize is {quantize!r}{did_you_mean(quantize, QUANTIZE)}")


def adapter_plan(info: AdapterInfo, *, quantize: str = "auto") -> tuple[list[dict], list[str]]:
    """(components, train) for a model that the adapter fits.

    Args:
        quantize: "auto" is the plan recorded with the adapter, or "none" where another tool wrote
            it; "nf4" stores the decoder's linear layers in NF4; "none" keeps 16 or 32 bits.

    Raises:
        CheckpointError: for another `quantize`, or a recorded plan that cannot be read.
    """
    check_quantize(quantize)
    if quantize == "auto" and info.base is not None:
        recorded = info.base.get("components"), info.base.get("train")
        if not (isinstance(recorded[0], list) and isinstance(recorded[1], list)):
            raise CheckpointError(f"{info.path / BASE_FILE}: needs lists components and train")
        return recorded[0], recorded[1]
    nf4 = quantize == "nf4"
    components: list[dict] = [dict(NF4_BASE)] if nf4 else []
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


def base_dtype(info: AdapterInfo) -> torch.dtype:
    """The dtype of the base that the adapter was trained on; bfloat16 where none is recorded.

    Raises:
        CheckpointError: if the record names no dtype that weights can have.
    """
    name = (info.base or {}).get("dtype", "bfloat16")
    if name not in ("float32", "bfloat16", "float16"):
        raise CheckpointError(
            f"{info.path / BASE_FILE}: dtype is {name!r}; allowed: float32, bfloat16, float16"
        )
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def load_with_adapter(
    path: str | Path,
    adapter: str | Path | None,
    *,
    quantize: str = "auto",
    format: str = AUTO,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
) -> CausalLM:
    """A checkpoint with its adapter, or the checkpoint alone, in eval mode.

    Args:
        path: the base checkpoint.
        adapter: an adapter directory, or None.
        quantize: as for `adapter_plan`; "auto" without an adapter is as the checkpoint is stored.
        format: of the checkpoint, as for `load_checkpoint`.
        dtype: of the base; None is the one the adapter was trained on, or bfloat16.
        device, compute_dtype: as for `load_checkpoint`.

    Raises:
        CheckpointError: if either cannot be read or they do not fit each other.
    """
    check_quantize(quantize)
    if adapter is not None:
        info = read_adapter(adapter)
        components, train = adapter_plan(info, quantize=quantize)
        dtype = dtype or base_dtype(info)
    else:
        stored = stored_plan(path, format=format) if quantize == "auto" else []
        components, train = [NF4_BASE] if quantize == "nf4" else stored, []
    model = load_checkpoint(
        path,
        components,
        format=format,
        train=train,
        device=device,
        dtype=dtype or torch.bfloat16,
        compute_dtype=compute_dtype,
    )
    if adapter is not None:
        load_adapter(model, adapter)
    return model.eval()
