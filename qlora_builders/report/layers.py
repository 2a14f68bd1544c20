"""What each layer's adapter has learned, and what quantization costs there."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch

from qlora_builders.checkpoint import adapter_plan, read_adapter, read_arch
from qlora_builders.checkpoint.peft_adapter import AdapterInfo
from qlora_builders.checkpoint.peft_export import PREFIX
from qlora_builders.checkpoint.weight_figures import WeightFigures, weight_figures
from qlora_builders.errors import QLoRAError
from qlora_builders.models import llama
from qlora_builders.report.run import Run


@dataclass(frozen=True)
class LayerFigures:
    """By linear slot: `layers.0.self_attn.q_proj`."""

    updates: dict[str, float] = field(default_factory=dict)  # |scaling B A|, Frobenius norm
    weights: dict[str, WeightFigures] = field(default_factory=dict)  # of the base, if it is there
    notes: tuple[str, ...] = ()  # what could not be measured, and why


def layer_figures(run: Run) -> LayerFigures:
    """Read from the run's adapter and its base checkpoint, one tensor at a time; never raises for
    what is missing or damaged there."""
    folder = run.adapter()
    if folder is None:
        return LayerFigures()
    try:
        info = read_adapter(folder)
        updates = {
            name.removeprefix("model."): update_norm(info, name)
            for name in sorted(info.modules, key=_in_order)
        }
    except (QLoRAError, OSError) as error:
        return LayerFigures(notes=(f"the adapter cannot be read: {error}",))
    base = run.base()
    if base is None:
        note = "the base checkpoint is not where the run found it, so weights are not compared"
        return LayerFigures(updates, notes=(note,))
    try:
        format = str(run.config.get("checkpoint.format", "auto"))
        arch = read_arch(base, format=format)
        components, train = adapter_plan(info)
        dtype = info.base.dtype if info.base else torch.bfloat16
        model = llama(arch, components, train=train, device="meta", dtype=dtype)
        return LayerFigures(updates, dict(weight_figures(model, base, format=format)))
    except (QLoRAError, OSError) as error:
        return LayerFigures(updates, notes=(f"the base checkpoint cannot be read: {error}",))


def update_norm(info: AdapterInfo, name: str) -> float:
    """|scaling B A| of a module, without the product: |B A|^2 = trace((B^T B) (A A^T)), rank by
    rank."""
    a = info.tensors[f"{PREFIX}{name}.lora_A.weight"].load().double()  # [rank, in]
    b = info.tensors[f"{PREFIX}{name}.lora_B.weight"].load().double()  # [out, rank]
    square = torch.sum((b.T @ b) * (a @ a.T)).clamp(min=0)  # symmetric, so no transpose
    return info.modules[name].scaling * square.sqrt().item()


def _in_order(name: str) -> list[int | str]:
    """`layers.10` after `layers.9`."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
