"""A resolved plan as rows of a table: what fills each slot, how many bits, what trains."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from torch import nn

from qlora_builders.models.components import resolve
from qlora_builders.models.llama import hf_name, linear_slots, other_modules
from qlora_builders.modules import CausalLM

_COUNTS = ("parameters", "base_bytes", "trainable", "adapter_bytes")


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
    groups: dict[tuple, list[tuple[int, SummaryRow]]] = {}
    for name in [*other_modules(arch), *plan]:
        module = model.get_submodule(hf_name(name))
        rule = plan.get(name)
        kind, options = type(module).__name__, {}
        if rule is not None:
            kind, options = rule.name, rule.options
        counts = _counts(module, tied=name == "lm_head" and model.tie_word_embeddings)
        row = SummaryRow(name, (name,), kind, options, **counts)
        layer = re.match(r"layers\.(\d+)\.", name)
        suffix = name[layer.end() :] if layer else name
        key = (suffix, kind, *options.items(), *counts.values())
        groups.setdefault(key, []).append((int(layer[1]) if layer else 0, row))
    return [row for rows in groups.values() for row in _merged(rows)]


def _counts(module: nn.Module, *, tied: bool) -> dict[str, int]:
    """The numbers of a row. What is tied is counted with the embedding."""
    counts = dict.fromkeys(_COUNTS, 0)
    for name, parameter in module.named_parameters():
        if tied and name.startswith("token_adapter."):
            continue
        counts["trainable"] += parameter.numel() if parameter.requires_grad else 0
        if name.startswith(("lora_", "token_adapter.")):
            counts["adapter_bytes"] += parameter.nbytes
        elif not (tied and name == "weight"):
            counts["parameters"] += parameter.numel()
            counts["base_bytes"] += parameter.nbytes
    return counts


def _merged(rows: list[tuple[int, SummaryRow]]) -> Iterator[SummaryRow]:
    """Consecutive layers with equal rows become one row."""
    for _, group in groupby(enumerate(rows), lambda at: at[1][0] - at[0]):
        run = [row for _, row in group]
        (first, row), (last, _) = run[0], run[-1]
        span = f".{first}." if first == last else f".{first}-{last}."
        yield replace(
            row,
            name=row.name.replace(f".{first}.", span, 1),
            slots=tuple(one.name for _, one in run),
            **{name: len(run) * getattr(row, name) for name in _COUNTS},
        )
