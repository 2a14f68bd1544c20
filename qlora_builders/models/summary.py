"""A resolved plan as rows of a table: what fills each slot, how many bits, what trains."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from qlora_builders.models.components import resolve
from qlora_builders.models.llama import hf_name, linear_slots, other_modules
from qlora_builders.modules import CausalLM


@dataclass(frozen=True)
class SummaryRow:
    """One slot, or the same slot of consecutive layers under the same component."""

    name: str  # "layers.0-3.mlp.up_proj"
    slots: tuple[str, ...]  # ("layers.0.mlp.up_proj", ...)
    kind: str  # of the component; for modules outside linear slots the class name
    options: dict[str, Any]
    parameters: int  # of the base: weight and bias
    base_bytes: int
    trainable: int  # parameters
    adapter_bytes: int

    @property
    def bits(self) -> float:
        """Bits per base parameter."""
        return 8 * self.base_bytes / self.parameters


def summarize(model: CausalLM) -> list[SummaryRow]:
    """Rows in the order of the model. Works on meta; nothing is dequantized."""
    arch = model.spec.arch
    plan = resolve(model.spec.components, linear_slots(arch))
    groups: dict[tuple, list[tuple[int | None, SummaryRow]]] = {}
    for name in [*other_modules(arch), *plan]:
        module = model.get_submodule(hf_name(name))
        rule = plan.get(name)
        kind = type(module).__name__ if rule is None else rule.name
        options = {} if rule is None else rule.options
        tied = name == "lm_head" and model.tie_word_embeddings
        layer = re.match(r"layers\.(\d+)\.(.+)", name)
        suffix = name if layer is None else layer[2]
        row = replace(_row(module, suffix, kind, options, tied), slots=(name,))
        key = (suffix, kind, tuple(options.items()), row.parameters, row.trainable)
        groups.setdefault(key, []).append((int(layer[1]) if layer else None, row))
    return [row for rows in groups.values() for row in _merged(rows)]


def _row(
    module: nn.Module, name: str, kind: str, options: dict[str, Any], tied: bool
) -> SummaryRow:
    base = adapter = base_bytes = adapter_bytes = trainable = 0
    for parameter_name, parameter in module.named_parameters():
        if tied and parameter_name.startswith("token_adapter."):
            continue  # counted with the embedding
        trainable += parameter.numel() if parameter.requires_grad else 0
        if parameter_name.startswith(("lora_", "token_adapter.")):
            adapter += parameter.numel()
            adapter_bytes += parameter.nbytes
        elif not (tied and parameter_name == "weight"):  # counted with the embedding
            base += parameter.numel()
            base_bytes += parameter.nbytes
    return SummaryRow(name, (), kind, options, base, base_bytes, trainable, adapter_bytes)


def _merged(rows: list[tuple[int | None, SummaryRow]]) -> Iterator[SummaryRow]:
    """Consecutive layers with equal rows become one row."""
    if rows[0][0] is None:
        yield from (row for _, row in rows)
        return
    layers = [layer for layer, _ in rows if layer is not None]
    row = rows[0][1]
    start = 0
    for end in range(1, len(layers) + 1):
        if end < len(layers) and layers[end] == layers[end - 1] + 1:
            continue
        count = end - start
        first, last = layers[start], layers[end - 1]
        span = str(first) if count == 1 else f"{first}-{last}"
        yield SummaryRow(
            name=f"layers.{span}.{row.name}",
            slots=tuple(slot for _, one in rows[start:end] for slot in one.slots),
            kind=row.kind,
            options=row.options,
            parameters=count * row.parameters,
            base_bytes=count * row.base_bytes,
            trainable=count * row.trainable,
            adapter_bytes=count * row.adapter_bytes,
        )
        start = end
