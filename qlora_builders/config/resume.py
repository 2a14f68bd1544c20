"""Whether a run may go on from a checkpoint: nothing that shapes its loss curve has changed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from qlora_builders.config.knobs import knobs
from qlora_builders.errors import ConfigError

_GONE = ("method.components", "method.train")  # checkpoints of 0.1.0 have the preset's rules


def curve_config(cfg: Any) -> dict[str, Any]:
    """Every key whose value shapes the loss curve, flat: `{"training.seed": 0, ...}`."""
    tree = asdict(cfg)
    free = {key for key, knob in knobs(type(cfg)).items() if not knob.shapes_curve}
    return {key: value for key, value in flatten(tree).items() if key not in free}


def check_same_curve(before: Mapping[str, Any], now: Mapping[str, Any], checkpoint: str) -> None:
    """
    Raises:
        ConfigError: with every key whose value is not that of the checkpoint.
    """
    missing = "not set"  # means the same as null, which newer keys are by default
    keys = [
        key
        for key in sorted(before.keys() | now.keys())
        if key not in _GONE and before.get(key) != now.get(key)
    ]
    differing = [
        f"{key}={_spell(now.get(key, missing))}, but the checkpoint was trained with "
        f"{_spell(before.get(key, missing))}"
        for key in keys
    ]
    if differing:
        raise refuse_to_resume(checkpoint, "with another config", differing)


def refuse_to_resume(checkpoint: str, why: str, differing: Sequence[str]) -> ConfigError:
    head = (
        f"cannot resume from {checkpoint} {why}; set these back, or start anew "
        "in another output_dir:"
    )
    return ConfigError(head, *differing)


def flatten(
    tree: Mapping[str, Any], prefix: str = "", whole: Collection[str] = ()
) -> dict[str, Any]:
    """`{"training": {"seed": 0}}` -> `{"training.seed": 0}`; not below the keys of `whole`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value and f"{prefix}{key}" not in whole:
            flat |= flatten(value, f"{prefix}{key}.", whole)
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _spell(value: Any) -> str:
    return "null" if value is None else str(value)
