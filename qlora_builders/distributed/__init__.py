"""One process or many: who there is, who holds what. One process is the case of a world of one."""

from qlora_builders.distributed.ranks import Ranks, join_ranks, with_ranks
from qlora_builders.distributed.sharding import (
    group_bytes,
    make_mesh,
    shard_model,
    sharding,
    whole_parameters,
)

__all__ = [
    "Ranks",
    "group_bytes",
    "join_ranks",
    "make_mesh",
    "shard_model",
    "sharding",
    "whole_parameters",
    "with_ranks",
]
