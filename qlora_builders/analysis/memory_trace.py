"""Counts the bytes of a training step without computing it: the step runs on the meta device.

The model's own code runs, so whatever it keeps, recomputes or frees is counted. Meta tensors take
the code paths of a GPU; where those of a CPU differ, and what kernels allocate inside, is stated
here.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from qlora_builders.kernels import MATMUL_OPS
from qlora_builders.kernels.products import SMALL_ELEMENTS, TILE_ELEMENTS
from qlora_builders.modules import CausalLM, Linear, LoRALinear
from qlora_builders.modules import loss as loss_module

aten = torch.ops.aten


@dataclass(frozen=True)
class Segment:
    """A part of a step: bytes it leaves behind (or frees), and its peak, over those at its start"""

    end: int = 0
    peak: int = 0


Segments = dict[str, Segment]


def trace_step(
    model: CausalLM, *, device_type: str, batch_size: int, seq_len: int, accumulate: bool = False
) -> Segments:
    """Trace the loss of a model and its backward, with every token a target.

    Args:
        model: on the meta device; its large weights are cast.
        device_type: "cpu" or "cuda", the device to stand in for; it is not touched.
        accumulate: gradients of an earlier batch are there already, and are not counted.

    Returns:
        "embedding", "forward I" of layer I, "loss" (with final norm and head), "loss backward",
        "backward I" unless no gradient reaches it, and "backward -1" of the embedding likewise.
    """
    vocab_size, hidden_size = model.spec.arch.vocab_size, model.spec.arch.hidden_size
    # The chunks of the loss are alike: two are traced, and what the others keep is added below.
    targets = batch_size * (seq_len - 1)
    traced = min(targets, 2 * max(1, loss_module._CHUNK_ELEMENTS // vocab_size))
    model.train()
    if device_type == "cpu":
        _cast_large_weights(model)
    # those that are not quantized
    there: list[Tensor] = [p for p in model.parameters() if not is_traceable_wrapper_subclass(p)]
    if accumulate:
        for parameter in filter(lambda p: p.requires_grad, there):
            parameter.grad = torch.empty_like(parameter)
        there += [p.grad for p in there if p.grad is not None]
    tile = 0 if device_type == "cpu" else TILE_ELEMENTS["cuda"]
    tracer = MemoryTracer(there, num_targets=traced, tile_elements=tile)
    ids = torch.empty(batch_size, seq_len, dtype=torch.long, device="meta")
    offloads = model.model.activation_checkpointing == "offload"
    if offloads:
        model.model.activation_checkpointing = "full"
    with torch.enable_grad(), _flash_on_meta(), tracer, _segments_at_layers(model, tracer):
        tracer.begin("embedding")
        loss = model.loss(ids, ids)
        tracer.begin("loss backward")
        loss.backward()
        tracer.begin("done")
    row_bytes = hidden_size * model.model.compute_dtype.itemsize
    kept = (targets - traced) * row_bytes  # gradients of the hidden states; and, until then, a copy
    segments = tracer.segments
    head, head_backward = segments["loss"], segments["loss backward"]
    segments["loss"] = Segment(head.end + kept, head.peak + 2 * kept)
    segments["loss backward"] = Segment(head_backward.end - kept, head_backward.peak)
    for index in range(len(model.model.layers) if offloads else 0):
        forward, backward = segments[f"forward {index}"], segments.get(f"backward {index}")
        segments[f"forward {index}"] = Segment(0, forward.peak)  # its input waits elsewhere
        if backward is not None:
            both = Segment(backward.end + forward.end, backward.peak + forward.end)
            segments[f"backward {index}"] = both
    return segments


def _cast_large_weights(model: CausalLM) -> None:
    """On CPUs these are cast by tiles, so their products allocate nothing, as if cast already."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if (
            isinstance(module, Linear | LoRALinear)
            and isinstance(weight, nn.Parameter)
            and not is_traceable_wrapper_subclass(weight)  # quantized
            and not weight.requires_grad
            and weight.numel() > SMALL_ELEMENTS
        ):
            module.weight = nn.Parameter(weight.to(model.model.compute_dtype), requires_grad=False)


class MemoryTracer(TorchDispatchMode):
    """Sums the storages that are alive, each from the op that makes it until it is freed.

    Args:
        there: tensors that exist before; they are not counted.
        num_targets: labels that count as targets, which would depend on data.
        tile_elements: of a quantized weight that a product decodes at once.
    """

    def __init__(
        self, there: Iterable[Tensor], *, num_targets: int = 0, tile_elements: int = 0
    ) -> None:
        super().__init__()
        self.segments: Segments = {}
        self.num_targets = num_targets
        self.tile_elements = tile_elements
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in there)
        self._name = ""
        self._live = self._start = self._peak = 0

    def begin(self, name: str) -> None:
        """Close the running segment and start another."""
        self.segments[self._name] = Segment(self._live - self._start, self._peak - self._start)
        self._name = name
        self._start = self._peak = self._live

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is aten.nonzero.default and args[0].is_meta:
            result = args[0].new_empty((self.num_targets, args[0].dim()), dtype=torch.long)
        else:
            result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        if func in MATMUL_OPS:
            self._peak = max(self._peak, self._live + self._scratch_bytes(args[0], kwargs or {}))
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        nbytes = storage.nbytes()
        self._known.add(storage)
        self._live += nbytes
        self._peak = max(self._peak, self._live)
        weakref.finalize(storage, self._free, nbytes)

    def _free(self, nbytes: int) -> None:
        self._live -= nbytes

    def _scratch_bytes(self, input: Tensor, options: dict[str, Any]) -> int:
        """The decoded tile; with several, `input @ W` also has a float32 sum and one product."""
        numel = options["shape"][0] * options["shape"][1]
        scratch = min(numel, self.tile_elements) * input.dtype.itemsize
        if numel > self.tile_elements > 0 and not options["transposed"]:
            scratch += input.shape[0] * options["shape"][1] * (4 + input.dtype.itemsize)
        return scratch


@contextmanager
def _flash_on_meta() -> Iterator[None]:
    """Attention on meta tensors as on real devices, where no matrix of all pairs exists."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("scaled_dot_product_attention", _flash_attention, "AutogradMeta")
    try:
        yield
    finally:
        library._destroy()


def _flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Output and log-sum-exp are kept, in the shapes that the CUDA kernels keep too."""
    output: Tensor = aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return output


@contextmanager
def _segments_at_layers(model: CausalLM, tracer: MemoryTracer) -> Iterator[None]:
    """Begin a segment at each layer's input, forward and (when its gradient is there) backward."""

    def starts(segment: str, previous: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if "loss" in tracer.segments:
                return  # computed again for backward
            tracer.begin(segment)
            if args[0].requires_grad:
                args[0].register_hook(lambda _: tracer.begin(previous))

        return hook

    layers = model.model.layers
    with ExitStack() as hooks:
        for index, layer in enumerate(layers):
            hook = starts(f"forward {index}", f"backward {index - 1}")
            hooks.enter_context(layer.register_forward_pre_hook(hook))
        hook = starts("loss", f"backward {len(layers) - 1}")
        hooks.enter_context(model.model.norm.register_forward_pre_hook(hook))
        yield
