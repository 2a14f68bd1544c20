"""Weights into a model that is sharded over ranks: each reads and quantizes what it will hold."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qlora_builders.checkpoint.safetensors_io import LazyTensor
from qlora_builders.tensor import NF4Tensor, held_elements, is_nf4_shard, shard_nf4, to_nf4
from qlora_builders.tensor.nf4_fsdp import with_local
from qlora_builders.tensor.sharded import held_rows, is_sharded, local_part

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def needed_rows(tensor: LazyTensor, parameter: DTensor) -> tuple[int, int]:
    """(start, stop): the rows of a weight that this rank has to read.

    All of them for a weight that is stored in NF4, and for one that is to get `bnb` scales, whose
    offset is the mean over the whole weight.
    """
    if not is_nf4_shard(parameter):
        return held_rows(parameter)
    options = local_part(parameter).nf4_options  # type: ignore[attr-defined]
    if tensor.quantized or options["scale_format"] == "bnb":
        return 0, parameter.shape[0]
    start, stop = held_elements(parameter)
    columns = parameter.shape[1:].numel()
    return start // columns, -(-stop // columns)


def read_rows(tensor: LazyTensor, parameter: Tensor) -> LazyTensor:
    """The part of a lazy tensor that this rank needs. Not every file can be read in parts."""
    if not is_sharded(parameter) or tensor.load_rows is None:
        return tensor
    start, stop = needed_rows(tensor, parameter)
    shape = torch.Size((stop - start, *tensor.shape[1:]))
    load = partial(tensor.load_rows, start, stop)
    return replace(tensor, shape=shape, load=load, load_into=None, map=None)


def place_rows(
    parameter: DTensor, tensor: LazyTensor, value: Tensor, device: torch.device
) -> nn.Parameter:
    """What takes the place of `parameter`.

    Args:
        tensor: as in the checkpoint.
        value: what `read_rows(tensor, parameter)` gave.

    Raises:
        ValueError: for NaN or infinity in what is to be quantized.
    """
    start, stop = needed_rows(tensor, parameter)
    if value.shape[0] != stop - start:
        value = value[start:stop]
    sharded: Any
    if is_nf4_shard(parameter):
        weight: Any = value.to(device)
        if not isinstance(weight, NF4Tensor):
            weight = _quantize(parameter, weight)
        sharded = shard_nf4(parameter, weight)
    else:
        if isinstance(value, NF4Tensor):
            value = value.dequantize()[slice(*held_rows(parameter))]
        sharded = with_local(parameter, value.to(device, parameter.dtype, copy=True))
    return nn.Parameter(sharded, requires_grad=parameter.requires_grad)


def _quantize(parameter: DTensor, rows: Tensor) -> NF4Tensor:
    """The whole weight, or the elements that this rank holds."""
    options = local_part(parameter).nf4_options  # type: ignore[attr-defined]
    if rows.shape == parameter.shape:
        return to_nf4(rows.to(parameter.dtype), **options)
    start, stop = held_elements(parameter)
    before = start % parameter.shape[1:].numel()  # elements of the first row that it does not hold
    part = rows.flatten()[before : before + stop - start]
    return to_nf4(part.to(parameter.dtype), **options)
