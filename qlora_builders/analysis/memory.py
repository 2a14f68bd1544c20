"""Peak memory of fine-tuning, phase by phase, predicted before anything is loaded.

Weights, gradients and optimizer state are counted from the plan; activations and temporaries are
traced (`memory_trace`), one layer of each kind, and replayed over all layers. Sizes are bytes.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from qlora_builders.analysis.memory_trace import MemoryTracer, Segment, Segments, trace_step
from qlora_builders.modules import CausalLM, is_adapter
from qlora_builders.tensor.sharded import held_bytes

# Resident memory of a CPU process that no tensor explains, as scripts/bench_memory.py measured it
# with torch 2.13: modules that torch imports at the first step (torch._dynamo and what it needs),
# and the code and buffers of its kernels.
CPU_LOAD_BYTES = 2 << 20
CPU_STEP_BYTES = 167 << 20
CPU_FLOAT32_BYTES = 29 << 20  # more of them where products are float32
CPU_COMPILE_BYTES = 100 << 20  # the compiler, and what it keeps of one kind of layer
_WAITING = 3  # weights; see checkpoint/tensor_files.py
CPU_TILE_BYTES = 8 << 20  # decoded rows of a weight, kept for all products; see kernels/
PROBE_SHAPE = (256, 256)  # as of most weights: some optimizers treat vectors apart, or refuse them
PROBE_ELEMENTS = 1 << 16


@dataclass(frozen=True)
class Phase:
    """Terms at the moment of the phase's peak; they add up to the peak."""

    name: str
    terms: dict[str, int]

    @property
    def peak(self) -> int:
        return sum(self.terms.values())


@dataclass(frozen=True)
class OptimizerMemory:
    """Bytes per trained parameter; some temporaries exist for one tensor at a time only."""

    state: float
    temporary_of_all: float
    temporary_of_one: float


def probe_optimizer(
    build: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
) -> OptimizerMemory:
    """What an optimizer allocates, seen on small parameters (on the CPU).

    Args:
        build: parameters -> optimizer.
    """

    def step(num_tensors: int) -> tuple[Segment, Segment]:
        parameters = [nn.Parameter(torch.zeros(PROBE_SHAPE)) for _ in range(num_tensors)]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        grads = [p.grad for p in parameters if p.grad is not None]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of optimizers for GPUs about this CPU
            optimizer = build(parameters)
            with MemoryTracer([*parameters, *grads]) as tracer:
                tracer.begin("first")
                optimizer.step()
                tracer.begin("second")
                optimizer.step()
                tracer.begin("done")
        return tracer.segments["first"], tracer.segments["second"]

    first, second = step(1)
    _, second_of_two = step(2)
    of_all = second_of_two.peak - second.peak
    return OptimizerMemory(
        state=first.end / PROBE_ELEMENTS,
        temporary_of_all=of_all / PROBE_ELEMENTS,
        temporary_of_one=(second.peak - of_all) / PROBE_ELEMENTS,
    )


def predict_phases(
    model: CausalLM,
    optimizer: OptimizerMemory,
    *,
    device_type: str,
    batch_size: int,
    seq_len: int,
    accumulate: bool = False,
    compiled: bool = False,
    num_shards: int = 1,
    cpu_offload: bool = False,
) -> list[Phase]:
    """Load, forward, backward and optimizer step, each at its peak, in a step after the first.

    Args:
        model: built by `llama` on the meta device, with its `activation_checkpointing` set.
        device_type: "cpu" (resident memory over that of a process that has imported torch) or
            "cuda" (memory of torch's allocator; the driver's own comes on top).
        batch_size, seq_len: of one forward pass on one rank, padding included; every token is a
            target.
        accumulate: whether a step has several forward passes.
        compiled: whether layers are; taken to keep for backward what they keep uncompiled.
        num_shards: ranks that share the model (FSDP2). Whole on each are then, beside its share,
            three layers (the one that computes, the next, and the buffer it arrives in), the norm
            and the head.
        cpu_offload: whether that share, its gradients and the optimizer are in host memory; on
            "cuda" their terms are then left out, but for the gradients of the layer that computes.
    """
    weights = weight_terms(model, num_shards)
    optimizer_state, optimizer_temporaries = _optimizer_bytes(model, optimizer, num_shards)
    gradients = gradient_bytes(model) // num_shards
    gathered = _gathered_bytes(model) if num_shards > 1 or cpu_offload else 0
    state = {"gathered weights": gathered, "optimizer state": optimizer_state}
    fixed = {**weights, **state, **_runtime(model, device_type, compiled)}
    small, kinds = _one_layer_of_each_kind(model)
    left_by = {"loss backward": gradient_bytes(small.model.norm, small.lm_head)}
    for index, layer in enumerate(small.model.layers):
        left_by[f"backward {index}"] = gradient_bytes(layer)
    in_flight = max(map(gradient_bytes, small.model.layers))
    trace = trace_step(
        small,
        device_type=device_type,
        batch_size=batch_size,
        seq_len=seq_len,
        accumulate=accumulate,
    )
    forward, backward = _replay(trace, kinds, {} if accumulate else left_by)
    backward["gradients"] = backward.get("gradients", 0) // num_shards
    if accumulate:
        forward["gradients"], backward["gradients"] = gradients, gradients
    step = {"gradients": gradients, "optimizer temporaries": optimizer_temporaries}
    phases = [
        Phase("load", {**_load_terms(model, device_type), **weights}),
        Phase("forward", {**fixed, **forward, **_heap_holes(model, device_type, forward)}),
        Phase("backward", {**fixed, **backward, **_heap_holes(model, device_type, backward)}),
        Phase("optimizer step", {**fixed, **step}),
    ]
    if cpu_offload and device_type == "cuda":
        return [_on_the_gpu(phase, set(weights), in_flight) for phase in phases]
    return phases


def _optimizer_bytes(
    model: CausalLM, optimizer: OptimizerMemory, num_shards: int
) -> tuple[int, int]:
    """What it keeps of a rank's share, and what it needs during a step."""
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    elements, largest = sum(trained) / num_shards, max(trained) / num_shards
    temporary = optimizer.temporary_of_all * elements + optimizer.temporary_of_one * largest
    return round(optimizer.state * elements), round(temporary)


def _on_the_gpu(phase: Phase, weights: set[str], gradients: int) -> Phase:
    """What of a phase is left there when a rank's share is in host memory."""
    host = weights | {"optimizer state", "optimizer temporaries", "weights being read"}
    terms = {name: size for name, size in phase.terms.items() if name not in host}
    if "gradients" in terms:
        terms["gradients"] = gradients if phase.name == "backward" else 0
    return Phase(phase.name, terms)


def _runtime(model: CausalLM, device_type: str, compiled: bool) -> dict[str, int]:
    if device_type != "cpu":
        return {}
    runtime = CPU_STEP_BYTES + compiled * CPU_COMPILE_BYTES
    if model.model.compute_dtype in (None, torch.float32):
        runtime += CPU_FLOAT32_BYTES
    return {"tile scratch": CPU_TILE_BYTES, "runtime": runtime}


def _heap_holes(model: CausalLM, device_type: str, terms: dict[str, int]) -> dict[str, int]:
    """What glibc keeps of freed tensors, after `bound_heap`: shares fitted to 18 measured peaks."""
    if device_type != "cpu":
        return {}
    if model.model.activation_checkpointing == "none":
        return {"heap holes": round(0.29 * terms.get("activations", 0))}
    return {"heap holes": round(0.5 * terms.get("temporaries", 0))}


def weight_terms(model: CausalLM, num_shards: int = 1) -> dict[str, int]:
    """Bytes of the parameters by component, or of a rank's share; a tied head counts once."""
    terms = dict.fromkeys(("embedding", "attention", "mlp", "norms", "lm_head", "adapters"), 0)
    for name, parameter in model.named_parameters():
        nbytes = parameter.nbytes if num_shards == 1 else held_bytes(parameter, num_shards)
        terms["adapters" if is_adapter(name) else _component(name)] += nbytes
    return terms


def gradient_bytes(*modules: nn.Module) -> int:
    """Bytes of the gradients of what trains."""
    return sum(p.nbytes for module in modules for p in module.parameters() if p.requires_grad)


def _gathered_bytes(model: CausalLM) -> int:
    layers = [sum(p.nbytes for p in layer.parameters()) for layer in model.model.layers]
    ends = [*model.model.norm.parameters(), *model.lm_head.parameters()]
    return 3 * max(layers) + sum(p.nbytes for p in ends)


def is_packed(parameter: nn.Parameter) -> bool:
    """Whether the weight is quantized."""
    return parameter.nbytes < parameter.numel() * parameter.dtype.itemsize


def _component(name: str) -> str:
    for part, term in (("embed_tokens", "embedding"), ("self_attn", "attention"), ("mlp", "mlp")):
        if f".{part}." in name:
            return term
    return "lm_head" if name.startswith("lm_head") else "norms"


def largest_that_fits(peak: Callable[[int], int], limit: int, *, step: int = 1) -> int:
    """The largest multiple of `step` whose peak is within `limit`; 0 if there is none.

    Args:
        peak: grows with its argument, nearly along a line, which makes this quick.
    """
    low, high = 0, None  # in steps; low fits, high does not
    guess, points = 8, []
    while high is None or high - low > 1:
        bytes_of_guess = peak(guess * step)
        if bytes_of_guess <= limit:
            low = guess
        else:
            high = guess
        points.append((guess, bytes_of_guess))
        slope = 0.0
        if len(points) > 1:
            (x0, y0), (x1, y1) = points[-2:]
            slope = (y1 - y0) / (x1 - x0)
        if slope > 0 and len(points) < 12:
            guess += math.floor((limit - bytes_of_guess) / slope)
        else:
            guess = 2 * guess if high is None else (low + high) // 2
        guess = max(low + 1, guess if high is None else min(guess, high - 1))
    return low * step


def _load_terms(model: CausalLM, device_type: str) -> dict[str, int]:
    """All weights, and those in another form that wait to become them: 16-bit files are assumed.

    On a CPU up to `_WAITING` wait to be quantized or cast, together no larger than the largest
    tensor; on a GPU the 16-bit form of one is there until it is quantized.
    """
    base = [p for name, p in model.named_parameters() if not is_adapter(name)]
    packed = [2 * p.numel() for p in base if is_packed(p)]
    if device_type == "cpu":
        cast = [2 * p.numel() for p in base if p.dtype.itemsize != 2 and not is_packed(p)]
        size = max(packed + cast, default=0)
        budget = 2 * max(p.numel() for p in base)
        waiting = size * min(_WAITING, budget // size) if size else 0
    else:
        waiting = max(packed, default=0)
    runtime = CPU_LOAD_BYTES if device_type == "cpu" else 0
    return {**weight_terms(model), "weights being read": waiting, "runtime": runtime}


def _one_layer_of_each_kind(model: CausalLM) -> tuple[CausalLM, list[int]]:
    """A copy with one layer of each kind, and which of them each layer is like.

    Layers are alike if their modules are, and what trains in them, and if a gradient passes through
    them to what lies below.
    """
    decoder = model.model
    kinds: dict[tuple, int] = {}
    chosen: list[nn.Module] = []
    kind_of_layer = []
    passes = any(p.requires_grad for p in decoder.embed_tokens.parameters())
    for layer in decoder.layers:
        parameters = tuple((p.dtype, p.requires_grad) for p in layer.parameters())
        key = (repr(layer), parameters, passes)
        passes = passes or any(requires_grad for _, requires_grad in parameters)
        if key not in kinds:
            kinds[key] = len(kinds)
            chosen.append(layer)
        kind_of_layer.append(kinds[key])
    memo = {id(decoder.layers): nn.ModuleList(copy.deepcopy(chosen))}
    return copy.deepcopy(model, memo), kind_of_layer


def _replay(
    trace: Segments, kinds: list[int], left_by: dict[str, int]
) -> tuple[dict[str, int], dict[str, int]]:
    """The terms at the peak of forward and at that of backward, from segments of each kind.

    Args:
        kinds: of each layer, an index of the trace's layers.
        left_by: segment of backward -> bytes of gradients that it leaves.
    """
    activations = gradients = 0  # kept so far
    forward, backward = [], []
    for name in ("embedding", *(f"forward {kind}" for kind in kinds), "loss"):
        term = "loss chunk" if name == "loss" else "temporaries"
        forward.append({"activations": activations, term: trace[name].peak})
        activations += trace[name].end
    for name in ("loss backward", *(f"backward {kind}" for kind in reversed(kinds)), "backward -1"):
        segment, new = trace.get(name, Segment()), left_by.get(name, 0)
        now = {"gradients": gradients, "activations": activations, "temporaries": segment.peak}
        backward.append(now)
        gradients += new
        activations += segment.end - new

    def size(terms: dict[str, int]) -> int:
        return sum(terms.values())

    return max(forward, key=size), max(backward, key=size)
