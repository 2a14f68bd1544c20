"""How large weights are, what quantizing makes of them, and how much of an adapter a merge keeps:
per layer in the weights, and in the logits of a sample.

For a layer with base weight W and update delta, what is written is never W + delta exactly: it is
rounded to the output dtype, or to NF4. All norms are Frobenius norms, relative to |delta|, because
an error that is small beside W can still be larger than everything that was learned.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_builders.checkpoint.formats import read_arch, read_tensors
from qlora_builders.errors import CheckpointError
from qlora_builders.models import hf_name, linear_slots, llama
from qlora_builders.modules import CausalLM, adapters_disabled
from qlora_builders.tensor import format_of, is_quantized, quantize, to_nf4

_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class WeightFigures:
    """Of one linear slot, or several: norms are Frobenius norms."""

    norm: float  # of the weight in the checkpoint
    error: float | None  # norm of what quantization changes; None: not quantized

    @property
    def relative_error(self) -> float | None:
        return None if self.error is None or self.norm == 0 else self.error / self.norm


def weight_figures(
    model: CausalLM, path: str | Path, *, format: str = "auto"
) -> Iterator[tuple[str, WeightFigures]]:
    """(slot, figures) of each linear slot, read from a checkpoint as they are asked for.

    Args:
        model: what the checkpoint would be loaded into; it may be on meta, and is not changed.
        path, format: of the checkpoint. A weight that is stored quantized is left out: what it was
            before is not known.

    Raises:
        CheckpointError: if a weight cannot be read, has another shape or cannot be quantized.
    """
    tensors = read_tensors(path, format=format)
    for slot in linear_slots(model.spec.arch):
        name = f"{hf_name(slot)}.weight"
        own = model.get_parameter(name)
        if name not in tensors or tensors[name].quantized:
            continue
        stored = tensors[name].load()
        if stored.shape != own.shape:
            raise CheckpointError(
                f"{path}: {name} has shape {list(stored.shape)}; the model needs {list(own.shape)}"
            )
        error, quantized_as = None, format_of(own)
        if quantized_as is not None:
            try:
                seen = quantize(stored.to(own.dtype), quantized_as).dequantize()
            except ValueError as fault:
                raise CheckpointError(f"{path}: {name}: {fault}") from fault
            error = _norm_by_rows(stored, seen)
        yield slot, WeightFigures(_norm_by_rows(stored), error)


def together(figures: Sequence[WeightFigures]) -> WeightFigures:
    """The figures of several weights as if they were one."""
    errors = [one.error for one in figures if one.error is not None]
    norm = math.hypot(*(one.norm for one in figures))
    return WeightFigures(norm, math.hypot(*errors) if errors else None)


def _norm_by_rows(stored: Tensor, seen: Tensor | None = None) -> float:
    """Of the weight, or of what another is off. A few rows at a time, for memory, and each row by
    itself: torch adds up float32 in float32, which is off by 5e-3 for a whole weight and by 2e-8
    so."""
    squares = 0.0
    for start in range(0, len(stored), _ROWS_AT_ONCE):
        some = slice(start, start + _ROWS_AT_ONCE)
        rows = stored[some].float()
        if seen is not None:
            rows = rows - seen[some].float()
        squares += torch.linalg.vector_norm(rows, dim=1).double().square().sum().item()
    return math.sqrt(squares)


# ---- what a merge loses -------------------------------------------------------------------------

# Largest |error| / |delta| that a merge may have unless told otherwise. On normal weights, rounding
# to bfloat16 has 0.17 for an update of 1 % of the weight's norm and 0.5 for one of 0.32 %; NF4 has
# 1.10 for 1 %, 0.78 for 10 % and 0.46 for 20 %.
MAX_ERROR = 0.5
SAMPLE_TOKENS = 64


@dataclass(frozen=True)
class LayerError:
    """One merged weight: base W, the update delta, and what is written for their sum.

    Attributes:
        weight: |W|.
        delta: |delta|.
        lost: |written - (W + delta)|, the rounding.
        shift: |written - (trained + delta)|, where `trained` is the weight seen in training: the
            rounding, and the base being another.
        along: for an NF4 weight, what is left of delta in written - NF4(W): the length along it.
    """

    name: str
    weight: float
    delta: float
    lost: float
    shift: float
    along: float | None = None

    @property
    def relative_delta(self) -> float:
        return _ratio(self.delta, self.weight)

    @property
    def error(self) -> float:
        return _ratio(self.lost, self.delta)

    @property
    def deviation(self) -> float:
        return _ratio(self.shift, self.delta)

    @property
    def kept(self) -> float | None:
        """The share of delta that is left. Near 0 where the codes do not move."""
        return None if self.along is None else _ratio(self.along, self.delta)

    def figures(self) -> dict[str, float | None]:
        names = ("relative_delta", "error", "deviation", "kept")
        return {name: getattr(self, name) for name in names}


def measure_layer(
    name: str, weight: Tensor, trained: Tensor, delta: Tensor, written: Tensor
) -> LayerError:
    """All [out, in]; `written` may be quantized. Computed in float32."""
    weight, trained, delta = weight.float(), trained.float(), delta.float()
    size, along = _norm(delta), None
    if is_quantized(written):
        before = quantize(weight.to(written.dtype), written.format).dequantize().float()
        written = written.dequantize()
        product = ((written.float() - before) * delta).sum(dtype=torch.float64).item()
        along = _ratio(product, size)
    return LayerError(
        name,
        weight=_norm(weight),
        delta=size,
        lost=_norm(written.float() - (weight + delta)),
        shift=_norm(written.float() - (trained + delta)),
        along=along,
    )


def delta_survival(weight: Tensor, delta: Tensor, **nf4_options: Any) -> LayerError:
    """What NF4 would keep of an update: `error` and `kept` of quantizing `weight` + `delta`."""
    written = to_nf4((weight.float() + delta.float()).to(weight.dtype), **nf4_options)
    return measure_layer("", weight, weight, delta, written)


def _norm(tensor: Tensor) -> float:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).item()


def _ratio(value: float, reference: float) -> float:
    """0 / 0 is 0: nothing was to be kept, and nothing was lost."""
    return value / reference if reference else (math.inf if value else 0.0)


@dataclass(frozen=True)
class LogitAgreement:
    """Merged model against base + adapter, on random tokens.

    Attributes:
        error: RMS of the difference over the RMS of what the adapter changes.
        relative: the same over the spread of the logits.
        top1: share of positions whose likeliest token is the same.
    """

    error: float
    relative: float
    top1: float


@dataclass(frozen=True)
class MergeReport:
    """The figures of every layer, of all of them together, and of the logits."""

    layers: tuple[LayerError, ...]
    logits: LogitAgreement

    @property
    def total(self) -> LayerError:
        """All layers as one long vector; a layer that is not written in NF4 keeps its delta."""
        layers, along = self.layers, None
        norms = {
            norm: math.hypot(*(getattr(layer, norm) for layer in layers))
            for norm in ("weight", "delta", "lost", "shift")
        }
        if any(layer.along is not None for layer in layers):
            shares = [one.delta * (one.delta if one.along is None else one.along) for one in layers]
            along = _ratio(sum(shares), norms["delta"])
        return LayerError("all layers", **norms, along=along)

    def to_json(self) -> str:
        layers = {layer.name: layer.figures() for layer in self.layers}
        content = {"total": self.total.figures(), "logits": asdict(self.logits), "layers": layers}
        return json.dumps(content, indent=2)


class MergeError(CheckpointError):
    """A merge that would lose more of the adapter than allowed; nothing is written."""

    def __init__(self, message: str, report: MergeReport) -> None:
        super().__init__(message)
        self.report = report


def check_merge(report: MergeReport, max_error: float, *, compare_logits: bool) -> None:
    """
    Raises:
        MergeError: if the error of the weights, or of the logits where they should agree, exceeds
            `max_error` or is no number.
    """
    total, off = report.total, report.logits.error
    problems = []
    if not total.error <= max_error:
        lost = f"|error| / |delta| of the weights is {total.error:.3g}"
        if total.kept is not None:
            lost += f" and {max(total.kept, 0):.0%} of the update survives NF4"
        problems.append(lost)
    # an adapter without effect gives nothing to relate the noise of two kernels to (1e-6, float32)
    alike = math.isinf(off) and report.logits.relative < 1e-5
    if compare_logits and not off <= max_error and not alike:
        problems.append(f"the logits are off by {off:.3g} of what the adapter changes")
    if problems:
        better = "dtype=float32" if total.kept is None else "format=hf"
        raise MergeError(
            f"the merged model would not be base + adapter: {'; '.join(problems)}; allowed: "
            f"{max_error:g}. Nothing was written. Use {better}, or accept it with a larger "
            "max_error",
            report,
        )


# ---- logits -------------------------------------------------------------------------------------


@torch.no_grad()
def logit_agreement(
    adapted: CausalLM, merged: CausalLM, tokens: int = SAMPLE_TOKENS
) -> LogitAgreement:
    """Both computed in float32, whatever the models' compute dtype is."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(adapted.spec.arch.vocab_size, (1, tokens), generator=generator)

    def logits(model: CausalLM) -> Tensor:
        device = next(model.parameters()).device
        output: Tensor = model(ids if device.type == "meta" else ids.to(device))
        return output.cpu()

    with _float32_eval(adapted), _float32_eval(merged):
        expected, got = logits(adapted), logits(merged)
        with adapters_disabled(adapted):
            bare = logits(adapted)
    difference = _norm(got - expected)
    return LogitAgreement(
        error=_ratio(difference, _norm(expected - bare)),
        relative=_ratio(difference, _norm(expected - expected.mean())),
        top1=(got.argmax(-1) == expected.argmax(-1)).float().mean().item(),
    )


@contextmanager
def _float32_eval(model: CausalLM) -> Iterator[None]:
    """Bfloat16 activations are noisier than what is measured here."""
    training, dtype = model.training, model.model.compute_dtype
    model.eval()
    model.model.compute_dtype = torch.float32
    try:
        yield
    finally:
        model.train(training)
        model.model.compute_dtype = dtype


def streamed_model(directory: Path) -> CausalLM:
    """A checkpoint directory as a model that holds one module's weights at a time."""
    model = llama(read_arch(directory), device="meta", compute_dtype=torch.float32).eval()
    tensors = read_tensors(directory)

    def fill(module: nn.Module, names: dict[str, str]) -> None:
        for leaf, name in names.items():
            setattr(module, leaf, nn.Parameter(tensors[name].load(), requires_grad=False))

    def empty(module: nn.Module, *_: object) -> None:
        module.to("meta")

    for prefix, module in model.named_modules():
        names = {leaf: f"{prefix}.{leaf}" for leaf, _ in module.named_parameters(recurse=False)}
        if names and prefix == "lm_head" and model.tie_word_embeddings:
            names = {"weight": "model.embed_tokens.weight"}
        if names:
            module.register_forward_pre_hook(lambda module, _, names=names: fill(module, names))
            module.register_forward_hook(empty)
    return model
