"""Step checkpoints: what a run needs to go on as if it had never stopped.

    checkpoints/step_N/
        adapter_model.safetensors ...  what trains, as `save_adapter` writes it; or whole weights,
                                       in their own dtype, as `save_checkpoint` does
        train_state.pt                 optimizer and random number generators (weights_only)
        shard-00001-....safetensors    where parameters are sharded, what rank 0 holds of the
                                       optimizer's state, and of weights where no adapter trains
        train_state.json               the step, and what the recipe says about the run
        manifest.json                  size and checksum of each file

There is no data position and no learning rate schedule to save: both are functions of the step.
A manifest proves that a file is the one it describes, not that a run wrote it: what is in
train_state.pt is checked before a run goes on from there.
"""

from __future__ import annotations

import copy
import json
import math
import pickle
import random
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from qlora_builders.checkpoint.peft.read import load_adapter
from qlora_builders.checkpoint.peft.write import collect_adapter, write_adapter_files
from qlora_builders.checkpoint.save import hf_parameters, lazy_parameter, write_hf_files
from qlora_builders.checkpoint.tensor_files import MAX_SHARD_BYTES, open_tensors
from qlora_builders.distributed import Ranks
from qlora_builders.distributed.sharding import (
    has_parts,
    read_parts,
    shard_optimizer_state_,
    stored_parts,
    write_parts,
)
from qlora_builders.errors import CheckpointError
from qlora_builders.files.folders import MANIFEST_FILE, atomic_directory, write_manifest
from qlora_builders.modules import CausalLM, LoRALinear
from qlora_builders.tensor.sharded import compute_device, copy_whole_, is_sharded

STATE_FILE = "train_state.pt"
INFO_FILE = "train_state.json"
_OPTIMIZER = "optimizer."  # before the names of its tensors among a model's
_SIDES = (3, 5, 7, 11)  # of a parameter to try an optimizer on: each stands for an axis
_POSITIONS = 624  # of numpy's generator in its block of random numbers, which numpy does not check

T = TypeVar("T")


@dataclass(frozen=True)
class StepState:
    """A run after a step, ready to be written.

    Attributes:
        write_trained: writes an adapter, or the whole weights of a model without one, into a
            folder; on the main rank, unless they are among `parts`.
        whole: optimizer and generators, but for what is in `parts`.
        parts: sharded tensors, of which every rank writes what it holds.
    """

    step: int
    about: dict[str, Any]
    write_trained: Callable[[Path], None] | None
    whole: dict[str, Any]
    parts: dict[str, Tensor]


@torch.no_grad()
def capture_step(
    model: CausalLM,
    optimizer: torch.optim.Optimizer,
    *,
    step: int,
    about: Mapping[str, Any],
    base_model: str,
    is_main: bool = True,
    copied: bool = False,
) -> StepState:
    """
    Args:
        model: sharded or not; adapters have to be whole on the main rank.
        about: what to say about the run; goes to JSON.
        base_model: path of the base checkpoint.
        copied: copy what trains to host memory, so that training can go on before it is written.
    """
    state, parts, adapters = optimizer.state_dict(), dict[str, Tensor](), has_adapters(model)
    trained = {} if adapters else _trained_weights(model)
    whole: dict[int, dict[str, Any]] = {index: {} for index in state["state"]}
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor) and is_sharded(value):
                parts[f"{_OPTIMIZER}{index}.{key}"] = value
            else:
                whole[index][key] = value
    state["state"] = whole
    if copied:
        state, parts, trained = _on_host(state), _on_host(parts), _on_host(trained)
    write_trained: Callable[[Path], None] | None = None
    if adapters:
        if is_main:
            adapter = collect_adapter(model, base_model=base_model)
            if copied:
                adapter = replace(adapter, tensors=_on_host(adapter.tensors))
            write_trained = partial(write_adapter_files, adapter)
    elif any(is_sharded(parameter) for parameter in model.parameters()):
        parts |= trained
    else:
        weights = hf_parameters(model) | (trained if copied else {})
        write_trained = partial(
            write_hf_files,
            [lazy_parameter(name, tensor, None) for name, tensor in weights.items()],
            arch=model.spec.arch,
            dtype=None,
            max_shard_bytes=MAX_SHARD_BYTES,
            companions=base_model,
        )
    saved = {"optimizer": state, "random": random_state(compute_device(model))}
    return StepState(step, dict(about), write_trained, saved, parts)


def write_step(folder: Path, state: StepState, ranks: Ranks | None = None) -> None:
    """Write a step checkpoint, atomically. All ranks must call it.

    Raises CheckpointError if it cannot be written, or the optimizer's state could not be read back.
    """
    folder, ranks = folder.absolute(), ranks or Ranks()

    def write_whole(directory: Path) -> None:
        if state.write_trained is not None:
            state.write_trained(directory)
        _save_state(state.whole, directory / STATE_FILE)
        text = json.dumps({"step": state.step, **state.about}, indent=2) + "\n"
        (directory / INFO_FILE).write_text(text)

    try:
        with ExitStack() as opened:
            directory = ranks.on_main(
                lambda: opened.enter_context(atomic_directory(folder, marker=MANIFEST_FILE))
            )
            ranks.on_main(lambda: write_whole(directory))
            if state.parts:
                write_parts(directory, state.parts, ranks.group)
            ranks.on_main(lambda: write_manifest(directory))
            ranks.on_main(opened.close)
    except OSError as error:
        reason = error.strerror or error  # as the main rank, on which atomic_directory says it
        raise CheckpointError(f"{folder}: cannot be written: {reason}") from error


def load_step(folder: Path, model: CausalLM, optimizer: torch.optim.Optimizer) -> None:
    """Put the weights that train, the optimizer and the generators where they were.

    The number of ranks may have changed.

    Raises CheckpointError if model or optimizer are not those of the checkpoint.
    """
    sharded, trained = has_parts(folder), _trained_weights(model)
    if has_adapters(model):
        load_adapter(model, folder)
    elif sharded:
        read_parts(folder, trained)
    else:
        stored = open_tensors(folder)
        for name, parameter in trained.items():
            if name not in stored:
                raise CheckpointError(f"{folder}: {name} is missing, which the model trains")
            tensor = stored[name]
            if tensor.shape != parameter.shape:
                raise CheckpointError(
                    f"{tensor.source}: {name} has shape {list(tensor.shape)}; "
                    f"the model needs {list(parameter.shape)}"
                )
            with torch.no_grad():
                copy_whole_(parameter, tensor.load())
    file = folder / STATE_FILE
    device = compute_device(model)
    state = read_state(file)
    if sharded:
        _load_parts(folder, state["optimizer"], optimizer)
    restore_optimizer(file, state["optimizer"], optimizer)
    shard_optimizer_state_(optimizer)
    try:
        set_random_state(state["random"], device)
    except RuntimeError as error:  # the GPU's, which `read_state` cannot try
        raise CheckpointError(f"{file}: random['cuda'] is no state of a generator") from error


def has_adapters(model: CausalLM) -> bool:
    return any(isinstance(module, LoRALinear) for module in model.modules())


def random_state(device: torch.device) -> dict[str, Any]:
    """Every generator that a run may draw from, in types that `weights_only` reads."""
    name, keys, *position = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.array(keys)), *position),
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    name, keys, *position = state["numpy"]
    np.random.set_state((name, keys.numpy(), *position))
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def _on_host(tensors: T) -> T:
    """The same structure with copies of all its tensors, in host memory."""
    copies: T = tree_map_only(Tensor, lambda t: t.detach().to("cpu", copy=True), tensors)
    return copies


def _save_state(state: dict[str, Any], file: Path) -> None:
    with file.open("wb") as handle:
        try:
            torch.save(state, handle)
        except RuntimeError as error:  # torch fails again when it closes, and hides the reason
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
    try:
        torch.load(file, mmap=True, weights_only=True)  # nothing is read but the structure
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            "the optimizer keeps state that cannot be restored safely, so the run could not be "
            f"resumed; choose another optimizer: {error}"
        ) from error


def _trained_weights(model: CausalLM) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _load_parts(folder: Path, state: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Add to an optimizer's state what was written in parts, sharded as its parameters are now."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    parts: dict[str, Tensor] = {}
    for name, stored in stored_parts(folder).items():
        if not name.startswith(_OPTIMIZER):
            continue
        index, _, key = name.removeprefix(_OPTIMIZER).partition(".")
        own = parameters[int(index)] if index.isdecimal() and int(index) < len(parameters) else None
        if own is None or own.shape != stored.size or int(index) not in state["state"]:
            raise CheckpointError(
                f"{folder}: does not fit the optimizer: {name} has shape {list(stored.size)}"
            )
        part = torch.empty_like(own, dtype=stored.properties.dtype)
        state["state"][int(index)][key] = parts[name] = part.detach()
    read_parts(folder, parts)


# ---- train_state.pt: what has to be in it -------------------------------------------------------


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

    Raises CheckpointError with the key that does not fit.
    """
    options = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
        for number, (own, group) in enumerate(zip(options, optimizer.param_groups, strict=True)):
            for key, value in own.items():
                name, stored = f"param_groups[{number}].{key}", group[key]
                if type(value) in (int, float):  # may be a tensor by now, but one number
                    if not _is_number(stored):
                        raise ValueError(f"{name} is {stored!r:.80}, not a finite number")
                elif type(value) is not type(stored) and None not in (value, stored):
                    raise ValueError(
                        f"{name} is {type(stored).__name__}, not {type(value).__name__}"
                    )
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


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return type(value) in (int, float) and math.isfinite(value)


def _check_optimizer(state: dict[str, Any]) -> None:
    within = "optimizer['param_groups']"
    groups = _item(state, "param_groups", list, "optimizer")
    known = [number for group in groups for number in _item(group, "params", list, within)]
    if not all(type(number) is int for number in known):
        raise ValueError(f"{within}['params'] holds what is no int")
    if known != list(range(len(known))):
        raise ValueError(f"{within} does not number its parameters from 0 on")
    values = _item(state, "state", dict, "optimizer")
    for number in values:
        name = f"optimizer['state'][{number!r}]"
        if isinstance(number, int) and not 0 <= number < len(known):
            raise ValueError(f"{name} is of no parameter; there are {len(known)}")
        steps = _item(values, number, dict, "optimizer['state']").get("step", 0)
        if not (_is_number(steps) and steps >= 0):
            raise ValueError(f"{name}['step'] is no number of steps")


def _check_random(state: dict[str, Any]) -> None:
    """By generators that nobody draws from."""

    def set_numpy(values: tuple[Any, ...]) -> None:
        name, keys, position, has_gauss, gauss = values
        inside = type(position) is int and 0 <= position <= _POSITIONS
        if not (inside and keys.dtype == torch.uint32 and keys.shape == (_POSITIONS,)):
            raise ValueError
        np.random.RandomState().set_state((name, keys.numpy(), position, has_gauss, gauss))

    tried: dict[str, tuple[type, Callable[[Any], Any]]] = {
        "python": (tuple, random.Random().setstate),
        "numpy": (tuple, set_numpy),
        "cpu": (Tensor, torch.Generator().set_state),
    }
    for key, (kind, set_state) in tried.items():
        value = _item(state, key, kind, "random")
        try:
            set_state(value)
        except (ValueError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
            raise ValueError(f"random[{key!r}] is no state of a generator") from error
    cuda = state.get("cuda")
    if cuda is not None and not (isinstance(cuda, Tensor) and cuda.dtype == torch.uint8):
        raise ValueError("random['cuda'] is no tensor of bytes")


def _check_shapes(optimizer: torch.optim.Optimizer) -> None:
    """Of PyTorch's own optimizers, whose state is there in full after one step."""
    if not f"{type(optimizer).__module__}.".startswith("torch.optim."):
        return
    number = -1
    for group in optimizer.param_groups:
        after_a_step = cache(partial(_state_after_a_step, optimizer, group))
        for parameter in group["params"]:
            number += 1
            name = f"optimizer['state'][{number}]"
            sides = {1: 1, **dict(zip(_SIDES, parameter.shape, strict=False))}
            for key, trial in after_a_step(parameter.ndim).items():
                if not isinstance(trial, Tensor):
                    continue
                own = _item(optimizer.state.get(parameter, {}), key, Tensor, name)
                shape = [sides[size] for size in trial.shape]
                if list(own.shape) != shape:
                    raise ValueError(
                        f"{name}[{key!r}] has shape {list(own.shape)}; its parameter needs {shape}"
                    )


def _state_after_a_step(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], ndim: int
) -> dict[str, Any]:
    trial = torch.nn.Parameter(torch.zeros(_SIDES[:ndim]))
    trial.grad = torch.ones_like(trial)
    options = {k: copy.deepcopy(v) for k, v in group.items() if k != "params"}
    for_gpus = dict.fromkeys(options.keys() & {"fused", "foreach", "capturable"}, False)
    kind: Any = type(optimizer)
    other = kind([{**options, **for_gpus, "params": [trial]}])
    other.step()
    return dict(other.state[trial])
