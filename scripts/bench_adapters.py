"""What DoRA and PiSSA cost in a training step, beside plain LoRA; last line JSON.

usage: python scripts/bench_adapters.py [--rounds 8] [--seq 512] [--rank 16] [--hidden 1024]

A Llama of two layers with random weights, one thread, float32. The variants take turns in one
process; a figure is the median of their steps' CPU time over that of LoRA. "peft" variants are
transformers + PEFT on a float32 base, over PEFT's own LoRA.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_builders import llama
from qlora_builders.checkpoint import arch_from_config
from qlora_builders.data import Batch
from qlora_builders.names import PROJECTIONS
from qlora_builders.training.optimizers import trainable_parameters
from qlora_builders.training.step import train_step

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "dora, dropout": {"use_dora": True, "dropout": 0.1},
    "pissa": {"init_lora_weights": "pissa_niter_1"},
}


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # what PEFT says about transformers
    ids = torch.randint(2000, (1, args.seq))
    config = LlamaConfig(
        vocab_size=2000,
        hidden_size=args.hidden,
        intermediate_size=11 * args.hidden // 4,
        num_hidden_layers=2,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 128,
        bos_token_id=None,
        eos_token_id=None,
    )
    steps = {name: our_step(config, args.rank, ids, options) for name, options in VARIANTS.items()}
    peft = {f"peft {name}": VARIANTS[name] for name in ("lora", "dora")}
    steps |= {name: peft_step(config, args.rank, ids, options) for name, options in peft.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds + 1):
        for name, step in steps.items():
            started = time.process_time()
            step()
            seconds[name].append(time.process_time() - started)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    base = {name: "peft lora" if name.startswith("peft") else "lora" for name in medians}
    ratios = {name: round(medians[name] / medians[base[name]], 3) for name in medians}
    print(json.dumps({"seconds": medians, "ratio": ratios, **vars(args)}))


def our_step(
    config: LlamaConfig, rank: int, ids: torch.Tensor, options: dict
) -> Callable[[], object]:
    rule = {"match": "layers.**", "kind": "qlora", "rank": rank, "alpha": 2 * rank, **options}
    arch = arch_from_config(config.to_dict())
    model = llama(arch, [rule], compute_dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=1e-4)
    return lambda: train_step(model, [Batch(ids, ids, [0])], optimizer, clip_grad_norm=1.0)


def peft_step(
    config: LlamaConfig, rank: int, ids: torch.Tensor, options: dict
) -> Callable[[], object]:
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(PROJECTIONS), **options)
    model = get_peft_model(LlamaForCausalLM(config), lora).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in (("rounds", 8), ("seq", 512), ("rank", 16), ("hidden", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


if __name__ == "__main__":
    main()
