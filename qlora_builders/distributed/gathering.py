"""Whole parameters on the main rank, for whoever writes them to files, and states read whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from qlora_builders.distributed.ranks import Ranks
from qlora_builders.tensor.sharded import held_rows, is_sharded, whole_tensor, with_local


@contextmanager
def whole_parameters(model: nn.Module, ranks: Ranks, *, only_trained: bool) -> Iterator[None]:
    """For a while the main rank's parameters are whole, plain and on the CPU. Others have none.

    All ranks must enter. Without sharding nothing happens.

    Args:
        only_trained: leave the frozen ones as they are.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward pass without backward may have left it whole
    sharded: list[tuple[nn.Module, str, nn.Parameter]] = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
        and bool(is_sharded(parameter))
        and (parameter.requires_grad or not only_trained)
    ]
    wholes: dict[int, nn.Parameter] = {}
    try:
        for module, name, parameter in sharded:
            if id(parameter) not in wholes:
                wholes[id(parameter)] = nn.Parameter(
                    _on_main(parameter, ranks), requires_grad=parameter.requires_grad
                )
            module._parameters[name] = wholes[id(parameter)]
        yield
    finally:
        for module, name, parameter in sharded:
            module._parameters[name] = parameter


def _on_main(tensor: Tensor, ranks: Ranks) -> Tensor:
    if not is_sharded(tensor):
        return tensor
    whole = whole_tensor(tensor)
    return whole.cpu() if ranks.is_main else torch.empty(0, dtype=tensor.dtype)


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
