"""Step checkpoints: what a run needs to go on as if it had never stopped.

    checkpoints/step_N/
        adapter_model.safetensors ...  what trains, as `save_adapter` writes it; whole weights, in
                                       their own dtype, as `save_checkpoint` does
        train_state.pt                 optimizer and random number generators (weights_only)
        train_state.json               the step, and what the recipe says about the run
        manifest.json                  size and checksum of each file

There is no data position and no learning rate schedule to save: both are functions of the step.
"""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from qlora_builders.checkpoint.hf_llama import save_checkpoint
from qlora_builders.checkpoint.manifest import MANIFEST_FILE, check_manifest, write_manifest
from qlora_builders.checkpoint.peft_adapter import load_adapter
from qlora_builders.checkpoint.peft_export import save_adapter
from qlora_builders.checkpoint.safetensors_io import atomic_directory, open_tensors
from qlora_builders.errors import CheckpointError
from qlora_builders.modules import CausalLM, LoRALinear
from qlora_builders.tensor.sharded import (
    compute_device,
    copy_whole_,
    shard_optimizer_state_,
)

STATE_FILE = "train_state.pt"
INFO_FILE = "train_state.json"


class HasState(Protocol):
    """An optimizer, or what one gathered from all ranks."""

    def state_dict(self) -> dict[str, Any]: ...


def save_step(
    folder: Path,
    model: CausalLM,
    optimizer: HasState,
    *,
    step: int,
    about: Mapping[str, Any],
    base_model: str,
) -> None:
    """Write a step checkpoint, atomically.

    Args:
        about: what to say about the run; goes to JSON.
        base_model: path of the base checkpoint.

    Raises:
        CheckpointError: if it cannot be written, or the optimizer's state could not be read back.
    """
    with atomic_directory(folder, marker=MANIFEST_FILE) as directory:
        if has_adapters(model):
            save_adapter(model, directory, base_model=base_model)
        else:
            save_checkpoint(model, directory, companions=base_model)
        device = compute_device(model)
        state = {"optimizer": optimizer.state_dict(), "random": random_state(device)}
        _save_state(state, directory / STATE_FILE)
        text = json.dumps({"step": step, **about}, indent=2) + "\n"
        (directory / INFO_FILE).write_text(text)
        write_manifest(directory)


def read_step(folder: Path) -> tuple[int, dict[str, Any]]:
    """The step of a checkpoint whose files are those that were written, and what it says.

    Raises:
        CheckpointError: if it is no step checkpoint, or a damaged one.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such directory; give one named .../checkpoints/step_N")
    check_manifest(folder)
    try:
        about = json.loads((folder / INFO_FILE).read_text())
        return int(about["step"]), about
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / INFO_FILE}: cannot be read: {error!r}") from error


def load_step(folder: Path, model: CausalLM, optimizer: torch.optim.Optimizer) -> None:
    """Put the weights that train, the optimizer and the generators where they were.

    Raises:
        CheckpointError: if model or optimizer are not those of the checkpoint.
    """
    if has_adapters(model):
        load_adapter(model, folder)
    else:
        _load_trained(model, folder)
    file = folder / STATE_FILE
    device = compute_device(model)
    state = torch.load(file, map_location="cpu", weights_only=True)
    try:
        optimizer.load_state_dict(state["optimizer"])
    except ValueError as error:
        raise CheckpointError(f"{file}: does not fit the optimizer: {error}") from error
    shard_optimizer_state_(optimizer)
    set_random_state(state["random"], device)


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


@torch.no_grad()
def _load_trained(model: CausalLM, folder: Path) -> None:
    stored = open_tensors(folder)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name not in stored:
            raise CheckpointError(f"{folder}: {name} is missing, which the model trains")
        tensor = stored[name]
        if tensor.shape != parameter.shape:
            raise CheckpointError(
                f"{tensor.source}: {name} has shape {list(tensor.shape)}; "
                f"the model needs {list(parameter.shape)}"
            )
        copy_whole_(parameter, tensor.load())
