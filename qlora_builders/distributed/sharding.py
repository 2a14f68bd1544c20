"""Models over ranks with FSDP2: one group of parameters per decoder layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    fully_shard,
    register_fsdp_forward_method,
)

from qlora_builders.distributed.ranks import Ranks
from qlora_builders.errors import ConfigError
from qlora_builders.modules import CausalLM


def sharding(
    ranks: Ranks, device_type: str, *, shard: int | None
) -> Callable[[CausalLM], None] | None:
    """What shards a model over the ranks; None for a process alone."""
    if ranks.size == 1 and not ranks.launched:
        return None
    mesh = make_mesh(ranks, device_type, shard=shard)
    return partial(shard_model, mesh=mesh)


def make_mesh(ranks: Ranks, device_type: str, *, shard: int | None = None) -> DeviceMesh:
    """The ranks as a mesh of axes (replicate, shard), or of one axis where there is one copy.

    Args:
        shard: ranks that share one copy of the model; None: all; 1: each has its own.

    Raises:
        ConfigError: if `shard` does not divide the number of ranks.
    """
    shard = ranks.size if shard is None else shard
    if ranks.size % shard:
        raise ConfigError(
            f"distributed.shard={shard} does not divide the {ranks.size} processes of this run"
        )
    if shard == ranks.size:
        return init_device_mesh(device_type, (shard,), mesh_dim_names=("shard",))
    shape = (ranks.size // shard, shard)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def shard_model(model: CausalLM, mesh: DeviceMesh) -> None:
    """Apply FSDP2 in place; parameters may be on meta still.

    Frozen parameters of any dtype, NF4 among them, share a group with float32 ones that train:
    FSDP2 gathers bytes, and asks for one dtype only of what has gradients. Gradients are added up
    over ranks, not averaged: a loss is divided by the tokens of all ranks before backward.
    """
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if not model.tie_word_embeddings:
        fully_shard(model.model.embed_tokens, mesh=mesh)
    fully_shard(model, mesh=mesh)  # what is left: final norm and head
    register_fsdp_forward_method(model, "loss")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction
