"""Time NF4 kernels against bitsandbytes and torchao, where installed; the last line is JSON.

usage: python scripts/bench_nf4.py [--device cpu|cuda] [--shapes 4096x4096,14336x4096,...]
                                   [--dtype bfloat16] [--tokens 256,1024] [--repeats 9]

Contestants alternate within one run and medians are reported, in milliseconds. Quantizing and
dequantizing use single-level scales for the peers and our default format, whose 8-bit scales are
decoded in the same pass. Beside them stand a copy of the decoded weight and the dense products,
the bounds of what dequantizing and a linear layer can reach. `reused` writes into a buffer that
exists already, which peers cannot do on CPUs; `fresh` allocates its result.

Llama 3 8B: 4096x4096, 14336x4096, 1024x4096. 70B: 8192x8192, 28672x8192, 1024x8192.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from qlora_builders import NF4Tensor, linear_nf4, to_nf4
from qlora_builders.kernels import nf4_cpu

Contestants = dict[str, Callable[[], Any]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", default="4096x4096,14336x4096")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", default="256,1024")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.manual_seed(0)
    results = {}
    for text in args.shapes.split(","):
        shape = tuple(int(size) for size in text.split("x"))
        weight = torch.randn(shape, device=args.device).mul_(0.02).to(getattr(torch, args.dtype))
        results[text] = run_shape(weight, [int(n) for n in args.tokens.split(",")], args.repeats)
        print(text, json.dumps(results[text], indent=2))
    versions = {name: version(name) for name in ("torch", "bitsandbytes", "torchao", "triton")}
    device = args.device if args.device == "cpu" else torch.cuda.get_device_name()
    info = {"device": device, "threads": torch.get_num_threads(), "versions": versions}
    print(json.dumps({**info, "dtype": args.dtype, "median_ms": results}))


def run_shape(weight: Tensor, tokens: list[int], repeats: int) -> dict[str, dict[str, float]]:
    ours = to_nf4(weight)
    bnb, torchao = installed("bitsandbytes.functional"), installed("torchao.quantization")
    packed = bnb and bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    quantize: Contestants = {"ours": lambda: to_nf4(weight)}
    if bnb:
        quantize["bitsandbytes"] = lambda: bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    if torchao:
        quantize["torchao"] = lambda: torchao.to_nf4(weight)
    results = {"quantize": measure(quantize, repeats)}
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        results[f"dequantize to {name}"] = measure(dequantizers(ours, bnb, packed, dtype), repeats)
    for count in tokens:
        for dtype in (torch.float32,) if weight.device.type == "cpu" else (torch.bfloat16,):
            name = f"linear forward + backward, {count} tokens, {str(dtype)[6:]}"
            results[name] = measure(linears(ours, count, dtype), repeats)
    return results


def dequantizers(ours: NF4Tensor, bnb: Any, packed: Any, dtype: torch.dtype) -> Contestants:
    """bitsandbytes decodes to the dtype that its state names."""
    buffer = ours.dequantize(dtype).flatten()
    contestants: Contestants = {"ours, fresh": lambda: ours.dequantize(dtype)}
    if ours.device.type == "cpu":
        fields = (ours.codes, ours.scales, ours.scale_groups)
        contestants["ours, reused"] = lambda: nf4_cpu.dequantize_range_(
            buffer, *fields, start=0, dtype=ours.dtype, **ours.nf4_format
        )
    if bnb:
        data, state = packed
        out = torch.empty(ours.shape, dtype=dtype, device=ours.device)

        def theirs() -> Tensor:
            state.dtype = dtype
            if ours.device.type == "cpu":
                return bnb.dequantize_4bit(data, state)
            return bnb.dequantize_4bit(data, state, out=out)

        contestants["bitsandbytes"] = theirs
    contestants["copy, fresh"] = lambda: buffer.clone()
    other = buffer.clone()
    contestants["copy, reused"] = lambda: other.copy_(buffer)
    return contestants


def linears(ours: NF4Tensor, count: int, dtype: torch.dtype) -> Contestants:
    out_features, in_features = ours.shape
    dense = ours.dequantize(dtype)
    input = torch.randn(count, in_features, dtype=dtype, device=ours.device)
    grad = torch.randn(count, out_features, dtype=dtype, device=ours.device)
    leaf = input.clone().requires_grad_()

    def quantized() -> None:
        linear_nf4(leaf, ours).backward(grad)
        leaf.grad = None

    return {"ours": quantized, "dense products": lambda: (input @ dense.t(), grad @ dense)}


def measure(contestants: Contestants, repeats: int) -> dict[str, float]:
    """Median milliseconds, taking turns; one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats + 1):
        for name, run in contestants.items():
            synchronize()
            started = time.perf_counter()
            run()
            synchronize()
            times[name].append(1e3 * (time.perf_counter() - started))
    return {name: round(median(values[1:]), 3) for name, values in times.items()}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def installed(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def version(name: str) -> str | None:
    module = installed(name)
    return None if module is None else module.__version__


if __name__ == "__main__":
    main()
