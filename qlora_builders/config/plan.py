"""From a config to component rules: what to train on, and what an adapter was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from qlora_builders.config.schema import EvaluateConfig, FinetuneConfig, GenerateConfig, MergeConfig
from qlora_builders.errors import ConfigError

NF4_BASE = {"match": "layers.**", "kind": "frozen_nf4"}
NF4_OPTIONS = ("block_size", "scale_block_size", "scale_format")


def plan_rules(cfg: FinetuneConfig) -> list[dict[str, Any]]:
    """The rules of the method, then the user's; the last one that matches a slot decides it."""
    return [*cfg.method.components, *cfg.components]


def train_patterns(cfg: FinetuneConfig) -> list[str]:
    """Patterns of the parameters that train beside the adapters."""
    return [*cfg.method.train, *cfg.train]


def base_rules(cfg: GenerateConfig | EvaluateConfig | MergeConfig) -> list[dict[str, Any]]:
    """Rules for the base that generate, evaluate and merge load, without adapters.

    An adapter corrects the very weights that it was trained on, rounding errors included. So
    `quantize=auto` repeats the plan in the config.yaml of the adapter's run, and a checkpoint
    without adapter (such as a merged one) stays as it is on disk.

    Raises:
        ConfigError: if quantize=auto and the adapter is not in the folder of a run.
    """
    if cfg.quantize == "nf4":
        return [dict(NF4_BASE)]
    if cfg.quantize == "none" or cfg.adapter.path is None:
        return []
    run = _run_config(Path(cfg.adapter.path))
    return [_without_adapter(rule) for rule in (*run["method"]["components"], *run["components"])]


def _without_adapter(rule: dict[str, Any]) -> dict[str, Any]:
    """The rule for the bare weight: qlora leaves its NF4 base, everything else a plain linear."""
    if rule["kind"] not in ("qlora", "frozen_nf4"):
        return {"match": rule["match"], "kind": "linear"}
    options = {name: rule[name] for name in NF4_OPTIONS if name in rule}
    return {"match": rule["match"], "kind": "frozen_nf4", **options}


def _run_config(adapter: Path) -> dict[str, Any]:
    """The config.yaml of the run that wrote `adapter` or `checkpoints/step_N/adapter`."""
    for folder in (adapter, *adapter.resolve().parents[:3]):
        file = folder / "config.yaml"
        if not file.is_file():
            continue
        run = OmegaConf.to_container(OmegaConf.load(file))
        if isinstance(run, dict) and isinstance(run.get("method"), dict) and "components" in run:
            return {str(key): value for key, value in run.items()}
    raise ConfigError(
        f"quantize=auto cannot tell how the base of the adapter {str(adapter)!r} was held in"
        " training: there is no config.yaml of a run in or above it; write quantize=nf4 (QLoRA)"
        " or quantize=none (LoRA)"
    )
