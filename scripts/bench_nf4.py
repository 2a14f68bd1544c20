"""Time NF4 kernels against bitsandbytes and torchao, where installed; the last line is JSON.

usage: python scripts/bench_nf4.py [--device cpu|cuda] [--shapes 4096x4096,14336x4096,...]
                                   [--dtype bfloat16] [--tokens 256,1024] [--repeats 9]

Contestants alternate within one run and medians are reported, in milliseconds; on a GPU they are
captured in CUDA graphs where they can be, which leaves the launches out. bitsandbytes has
single-level scales, which it is faster with; ours are the 8-bit ones of the default format, decoded
in the same pass. Beside them stand a copy of the decoded weight and the dense products, the bounds
of what dequantizing and a linear layer can reach; `matvec` is a product with one token. `reused`
writes into a buffer that exists already, which peers cannot do on CPUs; `fresh` allocates.

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
    peers = Peers(weight)
    ours = to_nf4(weight)
    results = {"quantize": measure({"ours": lambda: to_nf4(weight)} | peers.quantizers(), repeats)}
    for dtype in (torch.bfloat16, torch.float32):
        contestants = dequantizers(ours, dtype) | peers.dequantizers(dtype)
        results[f"dequantize to {name_of(dtype)}"] = measure(contestants, repeats)
    dtype = torch.float32 if weight.device.type == "cpu" else torch.bfloat16
    results[f"matvec, {name_of(dtype)}"] = measure(matvecs(ours, peers, dtype), repeats)
    for count in tokens:
        name = f"linear forward + backward, {count} tokens, {name_of(dtype)}"
        results[name] = measure(linears(ours, peers, count, dtype), repeats)
    return results


class Peers:
    """The same weight in bitsandbytes and torchao, where they are installed."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.bnb, self.torchao = installed("bitsandbytes"), installed("torchao.quantization")
        if self.bnb:
            self.packed, self.state = self.bnb.functional.quantize_nf4(weight)
        if self.torchao:
            self.nf4 = self.torchao.to_nf4(weight)

    def quantizers(self) -> Contestants:
        contestants: Contestants = {}
        if self.bnb:
            contestants["bitsandbytes"] = lambda: self.bnb.functional.quantize_nf4(self.weight)
        if self.torchao:
            contestants["torchao"] = lambda: self.torchao.to_nf4(self.weight)
        return contestants

    def dequantizers(self, dtype: torch.dtype) -> Contestants:
        """bitsandbytes decodes to the dtype that its state names; on GPUs into a buffer."""
        contestants: Contestants = {}
        out = torch.empty_like(self.weight, dtype=dtype) if self.weight.is_cuda else None

        def bitsandbytes() -> Tensor:
            self.state.dtype = dtype
            return self.bnb.functional.dequantize_4bit(self.packed, self.state, out=out)

        if self.bnb:
            contestants["bitsandbytes"] = bitsandbytes
        if self.torchao:
            contestants["torchao"] = lambda: self.nf4.to(dtype)
        return contestants

    def linear(self, input: Tensor) -> Contestants:
        contestants: Contestants = {}
        if self.bnb:
            packed, state = self.packed.t(), self.state
            contestants["bitsandbytes"] = lambda: self.bnb.matmul_4bit(input, packed, state)
        if self.torchao:
            contestants["torchao"] = lambda: torch.nn.functional.linear(input, self.nf4)
        return contestants


def dequantizers(ours: NF4Tensor, dtype: torch.dtype) -> Contestants:
    buffer = ours.dequantize(dtype).flatten()
    other = buffer.clone()
    backend: Any = nf4_cpu
    if ours.is_cuda:
        backend = importlib.import_module("qlora_builders.kernels.nf4_triton")
    return {
        "ours, fresh": lambda: ours.dequantize(dtype),
        "ours, reused": lambda: backend.dequantize_range_(
            buffer, ours.fields, start=0, dtype=ours.dtype, format=ours.format
        ),
        "copy, fresh": lambda: buffer.clone(),
        "copy, reused": lambda: other.copy_(buffer),
    }


def matvecs(ours: NF4Tensor, peers: Peers, dtype: torch.dtype) -> Contestants:
    dense = ours.dequantize(dtype)
    input = torch.randn(1, ours.shape[1], dtype=dtype, device=ours.device)
    contestants: Contestants = {
        "ours": lambda: linear_nf4(input, ours),
        "dense product": lambda: input @ dense.t(),
    }
    return contestants | peers.linear(input)


def linears(ours: NF4Tensor, peers: Peers, count: int, dtype: torch.dtype) -> Contestants:
    out_features, in_features = ours.shape
    dense = ours.dequantize(dtype)
    input = torch.randn(count, in_features, dtype=dtype, device=ours.device)
    grad = torch.randn(count, out_features, dtype=dtype, device=ours.device)
    leaf = input.clone().requires_grad_()

    def with_backward(forward: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            forward().backward(grad)
            leaf.grad = None

        return run

    forwards = {"ours": lambda: linear_nf4(leaf, ours)} | peers.linear(leaf)
    contestants: Contestants = {name: with_backward(run) for name, run in forwards.items()}
    contestants["dense products"] = lambda: (input @ dense.t(), grad @ dense)
    return contestants


def measure(contestants: Contestants, repeats: int) -> dict[str, float]:
    """Median milliseconds, taking turns; one round to warm up."""
    runs = {name: graphed(run) for name, run in contestants.items()}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats + 1):
        for name, (run, calls) in runs.items():
            synchronize()
            started = time.perf_counter()
            run()
            synchronize()
            times[name].append(1e3 * (time.perf_counter() - started) / calls)
    return {name: round(median(values[1:]), 4) for name, values in times.items()}


def graphed(run: Callable[[], Any], calls: int = 50) -> tuple[Callable[[], Any], int]:
    """On a GPU `calls` calls in one CUDA graph, or in a loop where it cannot be captured."""
    run()
    if not torch.cuda.is_available():
        return run, 1
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(calls):
                run()
    except RuntimeError:
        torch.cuda.synchronize()
        return lambda: [run() for _ in range(calls)], calls
    return graph.replay, calls


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
