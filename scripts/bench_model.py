"""A model with random weights: train steps, longest row, decoding, beside PEFT; last line JSON.

usage: python scripts/bench_model.py [--arch llama3_1_8b] [--device cuda] [--dtype bfloat16]
           [--seqs 2048,8192] [--steps 5] [--cap-gib 80] [--longest] [--new-tokens 64] [--peft]
           [--layers N] [--compile off,on]

Weights are drawn and quantized on the device layer by layer, so no checkpoint is needed. Rank 8 on
all seven projections, batch 1, activation checkpointing `full`, fused AdamW.

step_s            median over `--steps` after two that warm up
bound_s           two products (forward, gradient of the input) with every linear weight, measured
bound_fraction    bound_s / step_s; recomputing the forward pass puts it below 2/3 by itself
mfu               FLOPs of the model (no recomputation) per second, of the device's data sheet
dequantize_share  decoding every NF4 weight three times (forward, recomputation, backward)
decode            tokens/s of greedy decoding at batch 1, and the share of the bandwidth bound: the
                  bytes of all weights at the speed of a large copy
longest           tokens of the longest row that trains under `--cap-gib`, found by bisection
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from bench_train import RANK, PeakMemory, matmul_seconds, synchronize

from qlora_builders import LLAMA_ARCHS, LlamaArch, llama
from qlora_builders.data import Batch
from qlora_builders.models.generation import generate
from qlora_builders.modules import CausalLM
from qlora_builders.tensor import is_quantized
from qlora_builders.training.device import compile_layers
from qlora_builders.training.optimizers import trainable_parameters
from qlora_builders.training.step import train_step

# dense bfloat16 TFLOP/s of the data sheets
DATASHEET_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "RTX 4090": 165}
GRANULARITY = 1024  # of the longest sequence


def main() -> None:
    args = parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    arch = replace(LLAMA_ARCHS[args.arch], max_position_embeddings=2**20)
    if args.layers:
        arch = replace(arch, num_layers=args.layers)
    memory = PeakMemory(device)
    started = time.perf_counter()
    model = build(arch, device, dtype)
    result: dict[str, Any] = {
        "arch": args.arch,
        "layers": arch.num_layers,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "dtype": args.dtype,
        "build_s": round(time.perf_counter() - started, 2),
        "build_peak_mib": round(memory.peak_mib()),
        "model_mib": round(sum(p.nbytes for p in model.parameters()) / 2**20),
    }
    for mode in args.compile.split(","):
        compiled = compile_layers(model, mode, num_tokens=0)
        for seq in map(int, args.seqs.split(",")):
            key = f"{seq} tokens, {'compiled' if compiled else 'eager'}"
            result[key] = measure(model, seq, args.steps, memory)
            print(key, json.dumps(result[key]), flush=True)
    if args.new_tokens:
        result["decode"] = decode_speed(model, args.new_tokens)
        print("decode", json.dumps(result["decode"]), flush=True)
    if args.longest:
        result["longest"] = longest_sequence(model, args.cap_gib)
    if args.peft:
        del model
        gc.collect()
        result["peft"] = peft_steps(arch, device, dtype, args)
    print(json.dumps(result))


def build(arch: LlamaArch, device: torch.device, dtype: torch.dtype) -> CausalLM:
    plan = [{"match": "layers.**", "kind": "qlora", "rank": RANK, "alpha": 2 * RANK}]
    torch.manual_seed(0)
    model = llama(arch, plan, device=device, dtype=torch.bfloat16, compute_dtype=dtype)
    model.train()
    model.model.activation_checkpointing = "full"
    return model


def random_batch(model: CausalLM, seq: int) -> Batch:
    device = model.get_parameter("model.norm.weight").device
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(model.spec.arch.vocab_size, (1, seq), generator=generator).to(device)
    return Batch(ids, ids, rows=[0])


def measure(model: CausalLM, seq: int, steps: int, memory: PeakMemory) -> dict[str, Any]:
    parameter = model.get_parameter("model.norm.weight")
    device, dtype = parameter.device, model.model.compute_dtype
    assert dtype is not None
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=2e-4, fused=True)
    batch = random_batch(model, seq)
    memory.reset()
    step_s = time_steps(lambda: train_step(model, [batch], optimizer, clip_grad_norm=1.0), steps)
    peak = memory.peak_mib()
    bound_s = matmul_seconds(model, seq, dtype)
    return {
        "step_s": round(step_s, 4),
        "tok_s": round(seq / step_s, 1),
        "peak_mib": round(peak),
        "bound_s": round(bound_s, 4),
        "bound_fraction": round(bound_s / step_s, 3),
        "mfu": utilisation(model.spec.arch, seq, step_s, device),
        "dequantize_share": round(3 * dequantize_seconds(model, dtype) / step_s, 3),
    }


def time_steps(step: Callable[[], Any], steps: int) -> float:
    """Each step ends by reading its loss, so the device has finished."""
    seconds = []
    for _ in range(steps + 2):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:])


def utilisation(arch: LlamaArch, seq: int, step_s: float, device: torch.device) -> float | None:
    """Forward and input gradients of the frozen weights, and causal attention (1 + 2.5 passes)."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    peak = next((tflops for key, tflops in DATASHEET_TFLOPS.items() if key in name), None)
    attention = arch.hidden_size * (arch.num_heads + arch.num_kv_heads) * 2 * arch.head_dim
    weights = arch.num_layers * (attention + 3 * arch.hidden_size * arch.intermediate_size)
    weights += arch.vocab_size * arch.hidden_size
    scores = arch.num_layers * arch.num_heads * arch.head_dim * seq * seq / 2
    flops = 4 * weights * seq + 3.5 * 4 * scores
    return None if peak is None else round(flops / step_s / (peak * 1e12), 3)


@torch.no_grad()
def dequantize_seconds(model: CausalLM, dtype: torch.dtype) -> float:
    weights = [p for p in model.parameters() if is_quantized(p)]
    times = []
    for _ in range(3):
        synchronize(weights[0].device)
        started = time.perf_counter()
        for weight in weights:
            weight.dequantize(dtype)
        synchronize(weights[0].device)
        times.append(time.perf_counter() - started)
    return min(times)


def decode_speed(model: CausalLM, new_tokens: int) -> dict[str, Any]:
    device = model.get_parameter("model.norm.weight").device
    model.eval()
    speeds = []
    for _ in range(3):  # the first compiles
        synchronize(device)
        started = time.perf_counter()
        tokens = generate(
            model, range(1, 33), max_new_tokens=new_tokens, compile=device.type == "cuda"
        )
        count = len(list(tokens))
        synchronize(device)
        speeds.append(count / (time.perf_counter() - started))
    read = sum(p.nbytes for n, p in model.named_parameters() if "embed_tokens" not in n)
    bound = copy_bytes_per_second(device) / read
    model.train()
    return {
        "tok_s": round(max(speeds), 1),
        "bound_tok_s": round(bound, 1),
        "bound_fraction": round(max(speeds) / bound, 3),
    }


def copy_bytes_per_second(device: torch.device) -> float:
    """Read and written, by a copy that no cache holds."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(5):
        synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        times.append(time.perf_counter() - started)
    return 2 * source.nbytes / min(times)


def longest_sequence(model: CausalLM, cap_gib: float) -> dict[str, Any]:
    """By bisection, a step each; `offload` keeps the inputs of layers on the host."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap_gib * 2**30 / total))
    model.model.activation_checkpointing = "offload"
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=2e-4, fused=True)

    def fits(seq: int) -> bool:
        try:
            train_step(model, [random_batch(model, seq)], optimizer, clip_grad_norm=1.0)
        except torch.OutOfMemoryError:
            return False
        finally:
            optimizer.zero_grad(set_to_none=True)
            gc.collect()
            torch.cuda.empty_cache()
        return True

    low, high = 0, 1
    while fits(high * GRANULARITY):
        low, high = high, 2 * high
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * GRANULARITY) else (low, middle)
    return {"cap_gib": cap_gib, "tokens": low * GRANULARITY, "too_long": high * GRANULARITY}


# ---- the peer -----------------------------------------------------------------------------------


def peft_steps(
    arch: LlamaArch, device: torch.device, dtype: torch.dtype, args: argparse.Namespace
) -> dict[str, Any]:
    """The same steps by transformers + PEFT + bitsandbytes, if they are installed."""
    memory = PeakMemory(device)
    try:
        model = peft_model(arch, device, dtype)
    except ImportError as error:
        return {"error": str(error)}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)

    def step(ids: torch.Tensor) -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    results: dict[str, Any] = {}
    for seq in map(int, args.seqs.split(",")):
        ids = torch.randint(arch.vocab_size, (1, seq), device=device)
        memory.reset()
        try:
            step_s = time_steps(lambda ids=ids: step(ids), args.steps)  # type: ignore[misc]
        except torch.OutOfMemoryError as error:
            results[f"{seq} tokens"] = {"error": str(error)[:200]}
            continue
        results[f"{seq} tokens"] = {
            "step_s": round(step_s, 4),
            "tok_s": round(seq / step_s, 1),
            "peak_mib": round(memory.peak_mib()),
        }
    return results


def peft_model(arch: LlamaArch, device: torch.device, dtype: torch.dtype) -> Any:
    import bitsandbytes
    import peft
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=arch.vocab_size,
        hidden_size=arch.hidden_size,
        intermediate_size=arch.intermediate_size,
        num_hidden_layers=arch.num_layers,
        num_attention_heads=arch.num_heads,
        num_key_value_heads=arch.num_kv_heads,
        head_dim=arch.head_dim,
        max_position_embeddings=arch.max_position_embeddings,
    )
    with torch.device("meta"):
        model: Any = transformers.LlamaForCausalLM(config).bfloat16()
    for name, linear in list(model.model.named_modules()):
        if not isinstance(linear, torch.nn.Linear):
            continue
        quantized = bitsandbytes.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=dtype,
            quant_type="nf4",
            device="meta",
        )
        drawn = torch.randn(linear.weight.shape, device=device, dtype=torch.bfloat16) * 0.02
        weight: Any = bitsandbytes.nn.Params4bit(drawn, requires_grad=False, quant_type="nf4")
        quantized.weight = weight.to(device)
        parent, _, leaf = name.rpartition(".")
        setattr(model.model.get_submodule(parent), leaf, quantized)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                drawn = torch.randn(parameter.shape, device=device, dtype=torch.bfloat16) * 0.02
                setattr(module, name, torch.nn.Parameter(drawn))
    rotary = type(model.model.rotary_emb)
    with device:
        model.model.rotary_emb = rotary(config)
    model.is_loaded_in_4bit = True
    model = peft.prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    targets = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    lora = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets)
    return peft.get_peft_model(model, lora).train()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", default="llama3_1_8b", choices=sorted(LLAMA_ARCHS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--seqs", default="2048,8192")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--compile", default="off,on")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--cap-gib", type=float, default=80)
    parser.add_argument("--longest", action="store_true")
    parser.add_argument("--layers", type=int, help="fewer than the row has, to try the script")
    parser.add_argument("--peft", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
