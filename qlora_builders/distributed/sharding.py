"""Models over ranks with FSDP2: one group of parameters per decoder layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from qlora_builders.distributed.ranks import Ranks
from qlora_builders.errors import ConfigError
from qlora_builders.modules import CausalLM


def sharding(
    ranks: Ranks, device_type: str, *, shard: int | None, cpu_offload: bool
) -> Callable[[CausalLM], None] | None:
    """What shards a model over the ranks; None for a process alone.

    Raises:
        ConfigError: if `shard` does not divide the number of ranks, or a process alone is asked to
            offload.
    """
    shard = _shard_size(ranks, shard)
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

    Raises:
        ConfigError: if `shard` does not divide the number of ranks.
    """
    shard = _shard_size(ranks, shard)
    if shard == ranks.size:
        return init_device_mesh(device_type, (shard,), mesh_dim_names=("shard",))
    shape = (ranks.size // shard, shard)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def _shard_size(ranks: Ranks, shard: int | None) -> int:
    shard = ranks.size if shard is None else shard
    if ranks.size % shard:
        processes = "one process" if ranks.size == 1 else f"{ranks.size} processes"
        raise ConfigError(f"distributed.shard={shard} does not divide the {processes} of this run")
    return shard


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
