"""How large the weights of a checkpoint are, and what quantizing makes of them, one by one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qlora_builders.checkpoint.formats import read_tensors
from qlora_builders.errors import CheckpointError
from qlora_builders.models import hf_name, linear_slots
from qlora_builders.modules import CausalLM
from qlora_builders.tensor import format_of, quantize

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
        seen, quantized_as = None, format_of(own)
        if quantized_as is not None:
            try:
                seen = quantize(stored.to(own.dtype), quantized_as).dequantize()
            except ValueError as error:
                raise CheckpointError(f"{path}: {name}: {error}") from error
        yield slot, _figures(stored, seen)


def together(figures: Sequence[WeightFigures]) -> WeightFigures:
    """The figures of several weights as if they were one."""
    errors = [one.error for one in figures if one.error is not None]
    return WeightFigures(
        norm=math.hypot(*(one.norm for one in figures)),
        error=math.hypot(*errors) if errors else None,
    )


def _figures(stored: Tensor, seen: Tensor | None) -> WeightFigures:
    """A few rows at a time, for memory, and each row by itself: torch adds up float32 in float32,
    which is off by 5e-3 for a whole weight and by 2e-8 so."""
    norm, error = 0.0, 0.0
    for start in range(0, len(stored), _ROWS_AT_ONCE):
        rows = stored[start : start + _ROWS_AT_ONCE].float()
        norm += _sum_of_squares(rows)
        if seen is not None:
            error += _sum_of_squares(rows - seen[start : start + _ROWS_AT_ONCE].float())
    return WeightFigures(math.sqrt(norm), None if seen is None else math.sqrt(error))


def _sum_of_squares(rows: Tensor) -> float:
    return torch.linalg.vector_norm(rows, dim=1).double().square().sum().item()
