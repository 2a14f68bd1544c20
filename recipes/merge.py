"""Add an adapter to the weights it was trained on and write a Hugging Face directory.

    qlora merge adapter.path=... output_dir=... [checkpoint.dir=...]

The merged model is loaded again and its logits compared with those of base + adapter.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from qlora_builders.checkpoint import load_checkpoint, load_with_adapter, save_merged
from qlora_builders.config.checks import size_in_bytes
from qlora_builders.config.entry import run_recipe
from qlora_builders.config.schema import MergeConfig
from qlora_builders.errors import CheckpointError, ConfigError
from qlora_builders.modules import CausalLM
from qlora_builders.training.device import resolve_dtype

# Largest tolerated RMS difference of the logits, relative to their RMS around the mean. Rounding
# the merged weights to bfloat16 alone gives about 0.005.
MAX_RELATIVE_ERROR = 0.05
SAMPLE_TOKENS = 64


def main(cfg: MergeConfig) -> None:
    output_dir = Path(cfg.output_dir)
    if output_dir.exists():
        raise ConfigError(f"output_dir={output_dir} exists; choose a new folder")
    adapted = load_with_adapter(
        cfg.checkpoint.dir,
        cfg.adapter.path,
        quantize=cfg.quantize,
        format=cfg.checkpoint.format,
        compute_dtype=torch.float32,
    )
    save_merged(
        adapted,
        output_dir,
        base=cfg.base,
        dtype=resolve_dtype(cfg.dtype),
        max_shard_bytes=size_in_bytes(cfg.max_shard_size),
        companions=cfg.checkpoint.dir,
    )
    merged = load_checkpoint(
        output_dir, dtype=resolve_dtype(cfg.dtype), compute_dtype=torch.float32
    ).eval()
    error, agreement = compare(adapted, merged)
    print(
        f"wrote {output_dir}: against base + adapter, on {SAMPLE_TOKENS} random tokens, logits "
        f"differ by {error:.2%} (RMS) and the likeliest token agrees on {agreement:.0%}"
    )
    if cfg.base == "dequantized" and not error <= MAX_RELATIVE_ERROR:
        raise CheckpointError(
            f"{output_dir}: the merged model is not base + adapter: logits differ by {error:.2%}, "
            f"allowed {MAX_RELATIVE_ERROR:.0%}; try dtype=float32"
        )


@torch.inference_mode()
def compare(adapted: CausalLM, merged: CausalLM) -> tuple[float, float]:
    """(RMS of the logit difference relative to the logits' own spread, top-1 agreement)."""
    generator = torch.Generator().manual_seed(0)
    vocab_size = adapted.spec.arch.vocab_size
    ids = torch.randint(vocab_size, (1, SAMPLE_TOKENS), generator=generator)
    expected, got = adapted(ids), merged(ids)
    error = (got - expected).square().mean().sqrt() / expected.std()
    agreement = (got.argmax(-1) == expected.argmax(-1)).float().mean()
    return error.item(), agreement.item()


if __name__ == "__main__":
    sys.exit(run_recipe(main, "merge"))
