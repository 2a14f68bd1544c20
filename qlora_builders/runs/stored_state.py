"""train_state.pt: what has to be in it, before a run goes on from there.

A manifest proves that a file is the one it describes, not that a run wrote it.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora_builders.errors import CheckpointError

_SIDES = (3, 5, 7, 11)  # of a parameter to try an optimizer on: each stands for an axis
_POSITIONS = 624  # of numpy's generator in its block of random numbers, which numpy does not check


def read_state(file: Path, *, mapped: bool = False) -> dict[str, Any]:
    """
    Args:
        mapped: read the structure alone, and tensors where they are used.

    Raises:
        CheckpointError: with the key, if it is not what a run writes.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # of zip, pickle and torch, whatever damage leads them to
        raise CheckpointError(
            f"{file}: cannot be read ({type(error).__name__}): not what a run writes"
        ) from error
    try:
        _check_optimizer(_item(state, "optimizer", dict))
        _check_random(_item(state, "random", dict))
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}; not what a run writes") from error
    assert isinstance(state, dict)
    return state


def restore_optimizer(file: Path, state: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """`optimizer.load_state_dict(state)`, where the state is one of such an optimizer.

    Raises:
        CheckpointError: with the key that does not fit.
    """
    options = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
        for number, (own, group) in enumerate(zip(options, optimizer.param_groups, strict=True)):
            for key, value in own.items():
                _check_option(f"param_groups[{number}].{key}", value, group[key])
        _check_shapes(optimizer)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        reason = error if isinstance(error, ValueError) else repr(error)
        raise CheckpointError(f"{file}: does not fit the optimizer: {reason}") from error


def _item(mapping: Any, key: Any, kind: type, within: str = "") -> Any:
    if not isinstance(mapping, dict):
        raise ValueError(f"{within or 'it'} is {type(mapping).__name__}, not dict")
    name = f"{within}[{key!r}]" if within else str(key)
    if key not in mapping:
        raise ValueError(f"{name} is missing")
    if not isinstance(mapping[key], kind):
        raise ValueError(f"{name} is {type(mapping[key]).__name__}, not {kind.__name__}")
    return mapping[key]


def _check_optimizer(state: dict[str, Any]) -> None:
    known: list[int] = []
    groups = _item(state, "param_groups", list, "optimizer")
    for group in groups:
        numbers = _item(group, "params", list, "optimizer['param_groups']")
        if not all(type(number) is int for number in numbers):
            raise ValueError("optimizer['param_groups']['params'] holds what is no int")
        known += numbers
    if known != list(range(len(known))):
        raise ValueError("optimizer['param_groups'] does not number its parameters from 0 on")
    values = _item(state, "state", dict, "optimizer")
    for number in values:
        name = f"optimizer['state'][{number!r}]"
        if isinstance(number, int) and not 0 <= number < len(known):
            raise ValueError(f"{name} is of no parameter; there are {len(known)}")
        own = _item(values, number, dict, "optimizer['state']")
        if "step" in own and not _is_count(own["step"]):
            raise ValueError(f"{name}['step'] is no number of steps")


def _is_count(value: Any) -> bool:
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex() or value.dtype == torch.bool:
            return False
        value = value.item()
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def _check_random(state: dict[str, Any]) -> None:
    """By generators that nobody draws from."""
    _item(state, "python", tuple, "random")
    name, keys, position, has_gauss, gauss = _five(_item(state, "numpy", tuple, "random"))
    _item(state, "cpu", Tensor, "random")
    cuda = state.get("cuda")
    if cuda is not None and not (isinstance(cuda, Tensor) and cuda.dtype == torch.uint8):
        raise ValueError("random['cuda'] is no tensor of bytes")
    key = "python"
    try:
        random.Random().setstate(state["python"])
        key = "numpy"
        if not (type(position) is int and 0 <= position <= _POSITIONS):
            raise ValueError(f"position {position!r}")
        np.random.RandomState().set_state((name, keys.numpy(), position, has_gauss, gauss))
        key = "cpu"
        torch.Generator().set_state(state["cpu"])
    except (ValueError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"random[{key!r}] is no state of a generator") from error


def _five(values: tuple[Any, ...]) -> tuple[Any, ...]:
    keys = values[1] if len(values) == 5 else None
    if not isinstance(keys, Tensor) or keys.dtype != torch.uint32 or keys.shape != (_POSITIONS,):
        raise ValueError("random['numpy'] is no state of a generator")
    return values


def _check_option(name: str, own: Any, stored: Any) -> None:
    """Options may be tensors and change from step to step, but a number stays one."""
    if type(own) not in (int, float):
        if type(own) is not type(stored) and None not in (own, stored):
            raise ValueError(f"{name} is {type(stored).__name__}, not {type(own).__name__}")
        return
    if isinstance(stored, Tensor) and stored.numel() == 1:
        stored = stored.item()
    if type(stored) not in (int, float) or not math.isfinite(stored):
        raise ValueError(f"{name} is {stored!r:.80}, not a finite number")


def _check_shapes(optimizer: torch.optim.Optimizer) -> None:
    """Of PyTorch's own optimizers, whose state is there in full after one step."""
    if not f"{type(optimizer).__module__}.".startswith("torch.optim."):
        return
    number = -1
    for group in optimizer.param_groups:
        wanted: dict[int, dict[str, Any]] = {}  # by the number of axes
        for parameter in group["params"]:
            number += 1
            if parameter.ndim not in wanted:
                wanted[parameter.ndim] = _state_after_a_step(optimizer, group, parameter)
            own = optimizer.state.get(parameter, {})
            for key, shape in _fitted(wanted[parameter.ndim], parameter.shape):
                name = f"optimizer['state'][{number}][{key!r}]"
                if key not in own:
                    raise ValueError(f"{name} is missing")
                if not isinstance(own[key], Tensor):
                    raise ValueError(f"{name} is {type(own[key]).__name__}, not Tensor")
                if tuple(own[key].shape) != shape:
                    raise ValueError(
                        f"{name} has shape {list(own[key].shape)}; its parameter needs "
                        f"{list(shape)}"
                    )


def _state_after_a_step(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor
) -> dict[str, Any]:
    trial = torch.nn.Parameter(torch.zeros(_SIDES[: parameter.ndim]))
    trial.grad = torch.ones_like(trial)
    options = {k: copy.deepcopy(v) for k, v in group.items() if k != "params"}
    for_gpus = dict.fromkeys(options.keys() & {"fused", "foreach", "capturable"}, False)
    kind: Any = type(optimizer)
    other = kind([{**options, **for_gpus, "params": [trial]}])
    other.step()
    return dict(other.state[trial])


def _fitted(trial: dict[str, Any], shape: torch.Size) -> Iterator[tuple[str, tuple[int, ...]]]:
    sides = {1: 1, **dict(zip(_SIDES, shape, strict=False))}
    for key, value in trial.items():
        if isinstance(value, Tensor):
            yield key, tuple(sides[size] for size in value.shape)
