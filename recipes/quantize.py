"""Write a checkpoint with its linear layers in NF4.

    qlora quantize checkpoint.dir=... output_dir=... [format=bnb-4bit]

Weights that are stored in NF4 already keep their codes, so this converts between the two layouts
without loss.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from qlora_builders.checkpoint import load_checkpoint, save_checkpoint, stored_plan
from qlora_builders.config.checks import in_bytes
from qlora_builders.config.entry import run_recipe
from qlora_builders.config.schema import QuantizeConfig
from qlora_builders.errors import ConfigError
from qlora_builders.files.outputs import check_new
from qlora_builders.models import ComponentRule, summarize
from qlora_builders.training.device import resolve_dtype
from qlora_builders.visible import say


def main(cfg: QuantizeConfig) -> None:
    output_dir = Path(cfg.output_dir)
    check_new(output_dir, "output_dir", folder=True)
    model = load_checkpoint(
        cfg.checkpoint.dir, rules(cfg), format=cfg.checkpoint.format, dtype=resolve_dtype(cfg.dtype)
    )
    save_checkpoint(
        model,
        output_dir,
        format=cfg.format,
        max_shard_bytes=in_bytes(cfg.max_shard_size, "file"),
        companions=cfg.checkpoint.dir,
    )
    parameters = sum(row.parameters for row in summarize(model))
    written = sum(file.stat().st_size for file in output_dir.glob("*.safetensors"))
    say(
        f"wrote {output_dir}: {parameters:,} parameters in {written / 2**20:,.1f} MiB, "
        f"{8 * written / parameters:.2f} bits each"
    )


def rules(cfg: QuantizeConfig) -> list[dict[str, Any]]:
    """One rule for the decoder, or those that keep what is stored; then the user's."""
    for rule in map(ComponentRule.parse, cfg.components):
        if rule.adapter != "none":
            raise ConfigError(
                f"components: the rule with match {rule.match!r} is of kind {rule.name!r}, an "
                "adapter, which finetune adds; quantize takes frozen_nf4 and linear, and any base"
            )
    options = {name: getattr(cfg, name) for name in ("block_size", "scale_format", "scale_search")}
    given = {name: value for name, value in options.items() if value is not None}
    stored = stored_plan(cfg.checkpoint.dir, format=cfg.checkpoint.format)
    if not stored and cfg.format == "bnb-4bit" and not cfg.scale_search:
        given.setdefault("scale_format", "bnb")
    plan = stored or [{"match": "layers.**", "kind": "frozen_nf4"}]
    return [rule | given for rule in plan] + cfg.components


if __name__ == "__main__":
    sys.exit(run_recipe(main, "quantize"))
