"""Parameters over ranks: a DTensor of FSDP2, its rows on this rank, and the whole of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from qlora_builders.tensor.nf4_fsdp import (
    gather_nf4,
    is_nf4_shard,
    shard_nbytes,
    with_local,
)
from qlora_builders.tensor.nf4_tensor import NF4Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether this is a DTensor, without importing the type where nothing is distributed."""
    return hasattr(tensor, "device_mesh")


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds."""
    return getattr(tensor, "_local_tensor", tensor)


def compute_device(model: nn.Module) -> torch.device:
    """Where it computes: parameters that are offloaded, or whole for a while, are elsewhere."""
    parameters = list(model.parameters())
    meshes = [parameter.device_mesh for parameter in parameters if is_sharded(parameter)]
    return torch.device(meshes[0].device_type) if meshes else parameters[0].device


def held_rows(parameter: DTensor) -> tuple[int, int]:
    """(start, stop): the rows of a plain parameter that FSDP2 gives this rank."""
    axis = next(i for i, placement in enumerate(parameter.placements) if placement.is_shard())
    mesh, rows = parameter.device_mesh, parameter.shape[0]
    size = -(-rows // mesh.size(axis))  # as torch.chunk cuts
    start = min(mesh.get_local_rank(axis) * size, rows)
    return start, min(start + size, rows)


def held_bytes(parameter: Tensor, num_ranks: int) -> int:
    """Bytes that each of `num_ranks` ranks holds of a whole parameter once FSDP2 has sharded it.

    They are the same on every rank: the last ones are filled up. On meta nothing is allocated.
    """
    if isinstance(parameter, NF4Tensor):
        return shard_nbytes(parameter, num_ranks)
    rows = -(-parameter.shape[0] // num_ranks)
    return rows * parameter.shape[1:].numel() * parameter.dtype.itemsize


def whole_tensor(tensor: Tensor) -> Tensor:
    """The tensor itself, or of a sharded one the whole on every rank; all ranks must call it."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor.detach()
    return gather_nf4(sharded) if is_nf4_shard(sharded) else sharded.full_tensor()


@torch.no_grad()
def copy_whole_(parameter: Tensor, whole: Tensor) -> None:
    """`parameter.copy_(whole)`, of which a rank takes what it holds."""
    if not is_sharded(parameter):
        parameter.copy_(whole)
        return
    start, stop = held_rows(parameter)
    local_part(parameter).copy_(whole[start:stop])


def shard_optimizer_state_(optimizer: torch.optim.Optimizer) -> None:
    """After `load_state_dict` of a state that was saved whole: keep what this rank holds."""
    for parameter, state in optimizer.state.items():
        if not is_sharded(parameter):
            continue
        start, stop = held_rows(parameter)
        for key, value in state.items():
            whole = isinstance(value, Tensor) and not is_sharded(value)
            if whole and value.shape == parameter.shape:
                state[key] = with_local(parameter, value[start:stop].clone())
