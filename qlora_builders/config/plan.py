"""From a config to the component rules and patterns that the builder takes."""

from __future__ import annotations

from typing import Any

from qlora_builders.config.schema import FinetuneConfig


def plan_rules(cfg: FinetuneConfig) -> list[dict[str, Any]]:
    """The rules of the method, then the user's; the last one that matches a slot decides it."""
    return [*cfg.method.components, *cfg.components]


def train_patterns(cfg: FinetuneConfig) -> list[str]:
    """Patterns of the parameters that train beside the adapters."""
    rows = [f"embed_tokens[{','.join(map(str, cfg.train_tokens))}]"] if cfg.train_tokens else []
    return [*cfg.method.train, *cfg.train, *rows]
