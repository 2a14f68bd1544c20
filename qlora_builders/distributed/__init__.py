"""One process or many: who there is, who holds what. One process is the case of a world of one."""

from qlora_builders.distributed.ranks import Ranks, join_ranks
from qlora_builders.distributed.sharding import make_mesh, shard_model

__all__ = ["Ranks", "join_ranks", "make_mesh", "shard_model"]
