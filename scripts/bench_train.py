"""QLoRA steps on a checkpoint: time, memory, and the share of the matmul bound; last line JSON.

usage: python scripts/bench_train.py --checkpoint DIR [--seq 512] [--batch 1] [--steps 5]
           [--dtype float32|bfloat16] [--compile auto|on|off] [--activation-checkpointing MODE]
           [--method qlora|lora|full]

Rank 8 on all seven projections (full: every weight trains), AdamW, random tokens that all carry
loss, dtype for compute. One step is warm-up. Between two steps the bound is measured: two products
with every linear weight (forward, and the gradient of the input; full training has a third) in that
dtype, with the weights at hand; `bound_fraction` is the median of bound / step.
Memory is what the process (or the GPU's allocator) held at its peak over what it had after its
imports. torch._dynamo (150 MiB) is one of them: every optimizer of torch imports it, and where
PEFT's imports have been made it is there already.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import time
from pathlib import Path

import torch
import torch._dynamo

from qlora_builders import load_checkpoint
from qlora_builders.data import Batch
from qlora_builders.modules import CausalLM
from qlora_builders.names import CHECKPOINTING_MODES, COMPILE_MODES
from qlora_builders.training.device import bound_heap, compile_layers, resolve_device, set_seed
from qlora_builders.training.optimizers import trainable_parameters
from qlora_builders.training.step import train_step

RANK = 8
ADAPTED = {"match": "layers.**", "rank": RANK, "alpha": 2 * RANK}
PLANS = {
    "qlora": [{**ADAPTED, "kind": "qlora"}],
    "lora": [{**ADAPTED, "kind": "lora"}],
    "full": [{"match": "**", "kind": "linear", "trainable": True}],
}


def main() -> None:
    args = parse_args()
    device, dtype = resolve_device(args.device), getattr(torch, args.dtype)
    memory = PeakMemory(device)
    set_seed(0)
    started = time.perf_counter()
    model = load_checkpoint(
        args.checkpoint,
        PLANS[args.method],
        train=["**"] if args.method == "full" else [],
        device=device,
        compute_dtype=dtype,
    )
    load_s, load_peak = time.perf_counter() - started, memory.peak_mib()
    model.train()
    model.model.activation_checkpointing = args.activation_checkpointing
    bound_heap(model)
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=2e-4, fused=True)

    generator = torch.Generator().manual_seed(1)
    shape = (args.batch, args.seq)
    ids = torch.randint(model.spec.arch.vocab_size, shape, generator=generator).to(device)
    compiled = compile_layers(model, args.compile, num_tokens=ids.numel() * args.steps)
    batch = Batch(ids, ids, rows=list(range(args.batch)))
    seconds, cpu_seconds, bounds, losses, faults = [], [], [], [], []
    for _ in range(args.steps + 1):
        memory.reset()
        faults_before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        started, cpu_started = time.perf_counter(), time.process_time()
        losses.append(train_step(model, [batch], optimizer, clip_grad_norm=1.0).loss)
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - cpu_started)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults_before)
        peak = memory.peak_mib()
        bounds.append(matmul_seconds(model, ids.numel(), dtype))
    step_s = statistics.median(seconds[1:])
    print(f"steps {' '.join(f'{s:.2f}' for s in seconds)} s, bound {statistics.median(bounds):.2f}")
    result = {
        "library": "qlora_builders",
        "method": args.method,
        "dtype": args.dtype,
        "seq": args.seq,
        "batch": args.batch,
        "compiled": compiled,
        "activation_checkpointing": args.activation_checkpointing,
        "load_s": round(load_s, 2),
        "load_peak_mib": round(load_peak),
        "first_step_s": round(seconds[0], 2),
        "step_s": round(step_s, 3),
        "step_cpu_s": round(statistics.median(cpu_seconds[1:]), 3),
        "tok_s": round(ids.numel() / step_s, 1),
        "bound_s": round(statistics.median(bounds[1:]), 3),
        "bound_fraction": round(
            statistics.median(b / s for b, s in zip(bounds[1:], seconds[1:], strict=True)), 3
        ),
        "peak_mib": round(max(peak, load_peak)),
        "page_faults": int(statistics.median(faults[1:])),
        "loss": [round(loss, 4) for loss in losses],
    }
    print(json.dumps(result))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--compile", default="auto", choices=COMPILE_MODES)
    parser.add_argument("--activation-checkpointing", default="none", choices=CHECKPOINTING_MODES)
    parser.add_argument("--method", default="qlora", choices=list(PLANS))
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


class PeakMemory:
    """MiB over what the process had at the start; resident memory on CPUs (Linux)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        self.reset()
        self.before = self._peak()

    def reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM

    def peak_mib(self) -> float:
        return self._peak() - self.before

    def _peak(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 2**10


@torch.no_grad()
def matmul_seconds(model: CausalLM, tokens: int, dtype: torch.dtype) -> float:
    """Seconds of x W^T and y W for the weight shape of every linear layer, without adapters."""
    device = next(model.parameters()).device
    shapes = [
        tuple(module.weight.shape)
        for name, module in model.named_modules()
        if hasattr(module, "in_features") and "lora_" not in name
    ]
    counts = {shape: shapes.count(shape) for shape in set(shapes)}
    total = 0.0
    for (out_features, in_features), count in counts.items():
        weight = torch.full((out_features, in_features), 0.01, device=device, dtype=dtype)
        x = torch.ones(tokens, in_features, device=device, dtype=dtype)
        y = torch.ones(tokens, out_features, device=device, dtype=dtype)
        times = []
        for _ in range(3):
            x.fill_(1)  # the values of products of products would overflow
            synchronize(device)
            started = time.perf_counter()
            torch.mm(x, weight.t(), out=y)
            torch.mm(y, weight, out=x)
            synchronize(device)
            times.append(time.perf_counter() - started)
        total += count * min(times)
    return total


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
