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
"""

from __future__ import annotations

import json
import pickle
import random
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._pytree import tree_map_only

from qlora_builders.checkpoint.peft.read import load_adapter
from qlora_builders.checkpoint.peft.write import (
    AdapterFiles,
    collect_adapter,
    write_adapter_files,
)
from qlora_builders.checkpoint.save import (
    hf_parameters,
    lazy_parameter,
    write_hf_files,
)
from qlora_builders.checkpoint.tensor_files import MAX_SHARD_BYTES, open_tensors
from qlora_builders.distributed.gathering import shard_optimizer_state_
from qlora_builders.distributed.sharded_state import (
    has_parts,
    read_parts,
    stored_parts,
    write_parts,
)
from qlora_builders.errors import CheckpointError
from qlora_builders.files.folders import atomic_directory
from qlora_builders.files.manifest import MANIFEST_FILE, check_manifest, write_manifest
from qlora_builders.files.reading import read_json_object
from qlora_builders.models import LlamaArch
from qlora_builders.modules import CausalLM, LoRALinear
from qlora_builders.runs.stored_state import read_state, restore_optimizer
from qlora_builders.tensor.sharded import compute_device, copy_whole_, is_sharded

STATE_FILE = "train_state.pt"
INFO_FILE = "train_state.json"
_OPTIMIZER = "optimizer."  # before the names of its tensors among a model's

T = TypeVar("T")


@dataclass(frozen=True)
class StepState:
    """A run after a step, ready to be written.

    Attributes:
        trained: an adapter, or the whole weights of a model without one; on the main rank.
        whole: optimizer and generators, but for what is in `parts`.
        parts: sharded tensors, of which every rank writes what it holds.
    """

    step: int
    about: dict[str, Any]
    base_model: str
    arch: LlamaArch
    trained: AdapterFiles | dict[str, Tensor] | None
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
    state = optimizer.state_dict()
    parts: dict[str, Tensor] = {
        f"{_OPTIMIZER}{index}.{key}": value
        for index, values in state["state"].items()
        for key, value in values.items()
        if isinstance(value, Tensor) and is_sharded(value)
    }
    state["state"] = {
        index: {key: v for key, v in values.items() if f"{_OPTIMIZER}{index}.{key}" not in parts}
        for index, values in state["state"].items()
    }
    trained: AdapterFiles | dict[str, Tensor] | None = None
    if has_adapters(model):
        trained = collect_adapter(model, base_model=base_model) if is_main else None
    elif any(is_sharded(parameter) for parameter in model.parameters()):
        parts |= _trained_weights(model)
    else:
        trained = hf_parameters(model)
    if copied:
        state, parts = _on_host(state), _on_host(parts)
        if isinstance(trained, AdapterFiles):
            trained = replace(trained, tensors=_on_host(trained.tensors))
        elif trained is not None:
            trained |= _on_host(_trained_weights(model))
    whole = {"optimizer": state, "random": random_state(compute_device(model))}
    return StepState(step, dict(about), base_model, model.spec.arch, trained, whole, parts)


def write_step(
    folder: Path,
    state: StepState,
    *,
    on_main: Callable[[Callable[[], Any]], Any] = lambda function: function(),
    group: ProcessGroup | None = None,
) -> None:
    """Write a step checkpoint, atomically. All ranks must call it.

    Args:
        on_main: runs a function on the main rank; all ranks get what it returns or raises.
        group: of the ranks; by default the one of the run.

    Raises:
        CheckpointError: if it cannot be written, or the optimizer's state could not be read back.
    """
    folder = folder.absolute()
    try:
        with ExitStack() as opened:
            directory = on_main(
                lambda: opened.enter_context(atomic_directory(folder, marker=MANIFEST_FILE))
            )
            on_main(lambda: _write_whole(state, directory))
            if state.parts:
                write_parts(directory, state.parts, group)
            on_main(lambda: write_manifest(directory))
            on_main(opened.close)
    except OSError as error:
        reason = error.strerror or error  # as the main rank, on which atomic_directory says it
        raise CheckpointError(f"{folder}: cannot be written: {reason}") from error


def read_step(folder: Path) -> tuple[int, dict[str, Any]]:
    """The step of a checkpoint whose files are those that were written, and what it says.

    Raises:
        CheckpointError: if it is no step checkpoint, or a damaged one.
    """
    if folder.is_symlink():
        raise CheckpointError(f"{folder}: is a symbolic link; name the folder it leads to")
    if folder.is_file():
        raise CheckpointError(f"{folder}: is a file; give a folder named .../checkpoints/step_N")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such directory; give one named .../checkpoints/step_N")
    file = folder / INFO_FILE
    try:
        check_manifest(folder)
        about = read_json_object(file, expected="a step checkpoint")
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror}") from error
    step, named = about.get("step"), re.fullmatch(r"step_([0-9]+)", folder.name)
    if type(step) is not int or step < 1:
        raise CheckpointError(f"{file}: step is {step!r:.80}; expected a whole number >= 1")
    if named and int(named[1]) != step:
        raise CheckpointError(f"{file}: step is {step}, but the folder is {folder.name}")
    read_state(folder / STATE_FILE, mapped=True)
    return step, about


def load_step(folder: Path, model: CausalLM, optimizer: torch.optim.Optimizer) -> None:
    """Put the weights that train, the optimizer and the generators where they were.

    The number of ranks may have changed.

    Raises:
        CheckpointError: if model or optimizer are not those of the checkpoint.
    """
    sharded = has_parts(folder)
    if has_adapters(model):
        load_adapter(model, folder)
    elif sharded:
        read_parts(folder, _trained_weights(model))
    else:
        _load_trained(model, folder)
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


def _write_whole(state: StepState, directory: Path) -> None:
    """What the main rank writes: all but `parts`."""
    if isinstance(state.trained, AdapterFiles):
        write_adapter_files(state.trained, directory)
    elif state.trained is not None:
        write_hf_files(
            [lazy_parameter(name, tensor, None) for name, tensor in state.trained.items()],
            directory,
            arch=state.arch,
            dtype=None,
            max_shard_bytes=MAX_SHARD_BYTES,
            companions=state.base_model,
        )
    _save_state(state.whole, directory / STATE_FILE)
    text = json.dumps({"step": state.step, **state.about}, indent=2) + "\n"
    (directory / INFO_FILE).write_text(text)


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


@torch.no_grad()
def _load_trained(model: CausalLM, folder: Path) -> None:
    stored = open_tensors(folder)
    for name, parameter in _trained_weights(model).items():
        if name not in stored:
            raise CheckpointError(f"{folder}: {name} is missing, which the model trains")
        tensor = stored[name]
        if tensor.shape != parameter.shape:
            raise CheckpointError(
                f"{tensor.source}: {name} has shape {list(tensor.shape)}; "
                f"the model needs {list(parameter.shape)}"
            )
        copy_whole_(parameter, tensor.load())


def _load_parts(folder: Path, state: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Add to an optimizer's state what was written in parts, sharded as its parameters are now.

    Raises:
        CheckpointError: if the optimizer has no such parameters.
    """
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
