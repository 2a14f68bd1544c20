"""Models over ranks with FSDP2: one group of parameters per decoder layer; whole, or in parts.

Files of parts are those of torch.distributed.checkpoint's safetensors writer,
`shard-00002-model-...` that of rank 1. Their headers say where each part lies in the whole, so
there is no other metadata; in DCP's own format that is a pickle. Each rank writes its part, and any
number of ranks read them. DCP is imported where it is used: it takes torch._dynamo with it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from qlora_builders.distributed.ranks import Ranks
from qlora_builders.errors import CheckpointError, ConfigError
from qlora_builders.modules import CausalLM
from qlora_builders.tensor.sharded import held_rows, is_sharded, whole_tensor, with_local

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

_FILES = "shard-*.safetensors"


def sharding(
    ranks: Ranks, device_type: str, *, shard: int | None, cpu_offload: bool
) -> Callable[[CausalLM], None] | None:
    """What shards a model over the ranks; None for a process alone.

    Raises ConfigError if `shard` does not divide the number of ranks, or a process alone is asked
    to offload.
    """
    if shard is not None and ranks.size % shard:
        processes = "one process" if ranks.size == 1 else f"{ranks.size} processes"
        raise ConfigError(f"distributed.shard={shard} does not divide the {processes} of this run")
    if ranks.size == 1 and not ranks.launched:
        if cpu_offload:
            raise ConfigError(
                "distributed.cpu_offload=true takes --nproc-per-node; --nproc-per-node 1 will do"
            )
        return None
    mesh = make_mesh(ranks, device_type, shard=shard)
    return partial(shard_model, mesh=mesh, cpu_offload=cpu_offload)


def make_mesh(ranks: Ranks, device_type: str, *, shard: int | None = None) -> DeviceMesh:
    """The ranks as a mesh of axes (replicate, shard), or of one axis where there is one copy.

    Args:
        shard: ranks that share one copy of the model; None: all; 1: each has its own.
    """
    if shard is None or shard == ranks.size:
        return init_device_mesh(device_type, (ranks.size,), mesh_dim_names=("shard",))
    shape = (ranks.size // shard, shard)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def shard_model(model: CausalLM, mesh: DeviceMesh, *, cpu_offload: bool = False) -> None:
    """Apply FSDP2 in place; parameters may be on meta still.

    With `cpu_offload` a rank's share, its gradients and the optimizer stay in host memory, and
    what is not on meta has to be there.

    Frozen parameters of any dtype, NF4 among them, share a group with float32 ones that train:
    FSDP2 gathers bytes, and asks for one dtype only of what has gradients. Gradients are added up
    over ranks, not averaged: a loss is divided by the tokens of all ranks before backward.
    """
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    policy = offload if cpu_offload else OffloadPolicy()
    for module in _groups(model):
        fully_shard(module, mesh=mesh, offload_policy=policy)
    for method in ("loss", "log_probs"):
        register_fsdp_forward_method(model, method)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction


def group_bytes(model: CausalLM) -> list[int]:
    """Bytes of each group of parameters, which is whole on a rank while it computes.

    FSDP2 gathers the next group meanwhile. The model is not sharded yet; it may be on meta.
    """
    sizes: list[int] = []
    counted: set[int] = set()
    for module in _groups(model):
        own = {id(p): p.nbytes for p in module.parameters() if id(p) not in counted}
        counted |= own.keys()
        sizes.append(sum(own.values()))
    return sizes


def _groups(model: CausalLM) -> list[nn.Module]:
    """Each layer, the embedding, and what is left: final norm and head (with a tied embedding)."""
    embedding = [] if model.tie_word_embeddings else [model.model.embed_tokens]
    return [*model.model.layers, *embedding, model]


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
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}  # of tied ones several
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not bool(is_sharded(parameter)):
                continue
            if parameter.requires_grad or not only_trained:
                places.setdefault(parameter, []).append((module, name))
    try:
        for parameter, of_modules in places.items():
            whole = whole_tensor(parameter)
            whole = whole.cpu() if ranks.is_main else torch.empty(0, dtype=parameter.dtype)
            shown = nn.Parameter(whole, requires_grad=parameter.requires_grad)
            for module, name in of_modules:
                module._parameters[name] = shown
        yield
    finally:
        for parameter, of_modules in places.items():
            for module, name in of_modules:
                module._parameters[name] = parameter


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


def has_parts(directory: Path) -> bool:
    return any(directory.glob(_FILES))


def write_parts(
    directory: Path, tensors: Mapping[str, Tensor], group: ProcessGroup | None = None
) -> None:
    """Write what this rank holds of `tensors`, DTensors among them. All ranks must call it.

    Args:
        directory: on a file system that all ranks share.
        group: of the messages; by default the one of the run.

    Raises:
        CheckpointError: on all ranks, if one cannot write.
    """
    from torch.distributed import checkpoint as dcp

    writer = dcp.HuggingFaceStorageWriter(str(directory), save_distributed=True)
    try:
        dcp.save(dict(tensors), storage_writer=writer, process_group=group)
    except dcp.CheckpointException as error:
        causes = [f"rank {rank}: {cause[0]}" for rank, cause in error.failures.items()]
        raise CheckpointError(f"{directory}: cannot be written: {'; '.join(causes)}") from error


def stored_parts(directory: Path) -> dict[str, TensorStorageMetadata]:
    """Shape (`size`) and dtype (`properties.dtype`) of every whole tensor, by name.

    Raises CheckpointError if a file is damaged.
    """
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    try:
        stored = dcp.HuggingFaceStorageReader(str(directory)).read_metadata().state_dict_metadata
    except Exception as error:  # of safetensors and of all that may be missing in a header
        raise CheckpointError(f"{directory}/{_FILES}: cannot be read: {error!r}") from error
    return {
        name: tensor for name, tensor in stored.items() if isinstance(tensor, TensorStorageMetadata)
    }


@torch.no_grad()
def read_parts(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill `tensors`, which may be sharded in another way than what is stored; ranks do not wait
    for each other.

    Raises CheckpointError if one is not stored, or not with that shape.
    """
    from torch.distributed import checkpoint as dcp

    reader = dcp.HuggingFaceStorageReader(str(directory))
    stored = stored_parts(directory)
    for name, tensor in tensors.items():
        if name not in stored:
            raise CheckpointError(f"{directory}: {name} is missing")
        if stored[name].size != tensor.shape:
            raise CheckpointError(
                f"{directory}: {name} has shape {list(stored[name].size)}; "
                f"the model needs {list(tensor.shape)}"
            )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is taken for a single process
        try:
            dcp.load(dict(tensors), storage_reader=reader, no_dist=True)
        except dcp.CheckpointException as error:
            raise CheckpointError(f"{directory}/{_FILES}: cannot be read: {error}") from error
