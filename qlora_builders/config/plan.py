"""From a config to the component rules and patterns that the builder takes."""

from __future__ import annotations

from typing import Any

from qlora_builders.config.schema import FinetuneConfig
from qlora_builders.config.sections import PRESETS, MethodConfig


def plan_rules(cfg: FinetuneConfig) -> list[dict[str, Any]]:
    """The rules of the method, then the user's; the last one that matches a slot decides it."""
    return [*preset_rules(cfg.method), *cfg.components]


def train_patterns(cfg: FinetuneConfig) -> list[str]:
    """Patterns of the parameters that train beside the adapters."""
    rows = [f"embed_tokens[{','.join(map(str, cfg.train_tokens))}]"] if cfg.train_tokens else []
    return [*(["**"] if cfg.method.name == "full" else []), *cfg.train, *rows]


def preset_rules(method: MethodConfig) -> list[dict[str, Any]]:
    """The plan that `method=NAME` is short for; options at null are left to the components."""
    if method.name == "full":
        return [{"match": "**", "kind": "linear", "trainable": True}]

    def given(names: tuple[str, ...]) -> dict[str, Any]:
        values = {name: getattr(method, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    adapter, base = PRESETS[method.name]
    names = method.targets
    targets = names[0] if len(names) == 1 else "{" + ",".join(names) + "}"
    adapted = {"match": f"layers.*.*.{targets}", "kind": method.name, **given(adapter + base)}
    if not base:
        return [adapted]
    return [{"match": "layers.**", "kind": "frozen_nf4", **given(base)}, adapted]
