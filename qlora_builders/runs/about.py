"""What a step checkpoint says about its run, and whether another run may go on from there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Any

from qlora_builders.checkpoint.base_record import base_record, differing_keys
from qlora_builders.config.resume import check_same_curve, curve_config, refuse_to_resume
from qlora_builders.config.schema import FinetuneConfig
from qlora_builders.modules import CausalLM
from qlora_builders.runs.folder import Start
from qlora_builders.training.optimizers import check_same_past

# keys -> what they lead to: the base, which is compared by itself
_LEAD_TO_BASE = ("checkpoint.dir", "checkpoint.format", "model.arch")
_KINDS: dict[str, type] = {"total_steps": int, "config": dict, "compile": str}


def describe(cfg: FinetuneConfig, resolved: dict[str, str], total_steps: int) -> dict[str, Any]:
    """All that the loss curve depends on and that is known before the base is loaded, as JSON.

    Args:
        resolved: what takes the place of values that only lead to something.
    """
    config = curve_config(cfg) | resolved
    # infinity, which an optimizer may take, is no JSON
    same: dict[str, Any] = json.loads(json.dumps(config), parse_constant=str)
    return {"total_steps": total_steps, "config": same}


def check_about(about: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: if it is not what a run says about itself.
    """
    for key, kind in _KINDS.items():
        if type(about.get(key)) is not kind:
            raise ValueError(f"{key} is {about.get(key)!r:.80}; expected {kind.__name__}")
    if about["step"] > about["total_steps"]:
        raise ValueError(f"step is {about['step']} of a run of {about['total_steps']}")
    if about["compile"] not in ("on", "off"):
        raise ValueError(f"compile is {about['compile']!r:.80}; expected on or off")
    date = about.get("date")  # which, as the base, checkpoints did not have from the first
    try:
        datetime.fromisoformat(date or "2000-01-01")
    except (TypeError, ValueError) as error:
        raise ValueError(f"date is {date!r:.80}; expected one such as 2026-12-01T12:00") from error
    base = about.get("base")
    if base is not None and not (
        isinstance(base, dict)
        and isinstance(base.get("content"), str)
        and isinstance(base.get("config"), dict)
    ):
        raise ValueError(f"base is {base!r:.80}; expected content and config")


def check_resume(start: Start, about: Mapping[str, Any], cfg: FinetuneConfig) -> None:
    """The run that goes on has to be the run that was stopped.

    Raises:
        ConfigError: if its config is another. The base is left to `check_resumed_base`.
    """
    if start.folder is None:
        return
    free = _LEAD_TO_BASE if "base" in start.about else ()
    before, now = (
        {key: value for key, value in one["config"].items() if key not in free}
        for one in (start.about, about)
    )
    check_same_curve(before, now, str(start.folder))
    check_same_past(
        asdict(cfg.lr_schedule),
        total_steps=about["total_steps"],
        before=start.about["total_steps"],
        steps_done=start.step,
    )


def describe_base(model: CausalLM) -> dict[str, Any]:
    record = base_record(model)
    return {"content": record["checkpoint"]["content_hash"], "config": record["config"]}


def check_resumed_base(start: Start, base: Mapping[str, Any], cfg: FinetuneConfig) -> None:
    """Content decides, wherever the base lies.

    Raises:
        ConfigError: if its weights, or what decides their function, are others.
    """
    before = start.about.get("base")
    if before is None:
        return
    problems = differing_keys(before["config"], base["config"])
    if before["content"] != base["content"]:
        problems.append(
            f"content of its weights: trained with {before['content'][:12]}, here "
            f"{base['content'][:12]}"
        )
    name = f"checkpoint.dir={cfg.checkpoint.dir}"
    if cfg.model.arch is not None:
        name += f" model.arch={cfg.model.arch}"
    if problems:
        lines = [f"{name}: {problem}" for problem in problems]
        raise refuse_to_resume(str(start.folder), "with another base", lines)
