"""What a rank holds of a sharded model, counted on meta and as it is; what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from archs import tiny_arch
from ranks import run_ranks
from torch.distributed.tensor import Shard, distribute_tensor

from qlora_builders import llama
from qlora_builders.distributed import Ranks, group_bytes, make_mesh, shard_model, sharding
from qlora_builders.errors import ConfigError
from qlora_builders.modules import CausalLM
from qlora_builders.tensor import format_of, gather
from qlora_builders.tensor.sharded import held_bytes, held_rows, local_part, with_local

ARCH = tiny_arch(hidden_size=42, intermediate_size=75, num_heads=3, num_kv_heads=1, head_dim=14)
PLAN = [
    {"match": "layers.**", "kind": "qlora", "rank": 2, "alpha": 4, "scale_block_size": 5},
    {"match": "layers.1.mlp.up_proj", "kind": "frozen_nf4", "scale_format": "bnb"},
    {"match": "layers.1.mlp.down_proj", "kind": "frozen_nf4", "scale_format": "none"},
    {"match": "layers.0.mlp.*", "base": "mxfp4"},
    {"match": "layers.1.self_attn.*", "base": "mxfp4", "adapter": "lora", "rank": 2, "alpha": 4},
]


def resident_bytes(model: CausalLM) -> int:
    """Of a plain shard, FSDP2 keeps the padded rows and shows the real ones."""
    parts = [local_part(parameter) for parameter in model.parameters()]
    return sum(
        part.untyped_storage().nbytes() if type(part) is torch.Tensor else part.nbytes
        for part in parts
    )


def compare_bytes(ranks: Ranks) -> None:
    model = llama(ARCH, PLAN, dtype=torch.bfloat16)
    expected = sum(held_bytes(parameter, ranks.size) for parameter in model.parameters())
    groups = group_bytes(model)
    shard_model(model, make_mesh(ranks, "cpu"))
    model(torch.arange(8).view(1, -1))
    model.reshard()
    assert resident_bytes(model) == expected
    for layer, size in zip(model.model.layers, groups, strict=False):
        layer.unshard()
        assert sum(parameter.nbytes for parameter in layer.parameters()) == size
        layer.reshard()


def test_what_a_rank_holds_is_what_was_counted() -> None:
    run_ranks(3, compare_bytes)


def compare_losses(ranks: Ranks) -> None:
    torch.manual_seed(0)
    whole = llama(ARCH, PLAN, dtype=torch.bfloat16)
    model = copy.deepcopy(whole)
    shard_model(model, make_mesh(ranks, "cpu"))
    for (name, ours), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
        if format_of(theirs) is not None:
            fields = zip(gather(ours).fields, theirs.fields, strict=True)
            assert all(torch.equal(*pair) for pair in fields), name
    ids = torch.arange(16).view(2, -1)
    assert torch.equal(model(ids), whole(ids))


def test_every_type_is_gathered_as_it_was_stored() -> None:
    run_ranks(3, compare_losses)


def place_on_the_host(ranks: Ranks) -> None:
    mesh = make_mesh(ranks, "cpu")
    parameter = distribute_tensor(torch.zeros(5, 2), mesh, [Shard(0)])
    mesh._device_type = "meta"  # as where parameters are offloaded: the mesh's device is another
    rows = torch.ones(held_rows(parameter)[1] - held_rows(parameter)[0], 2, dtype=torch.bfloat16)
    placed = with_local(parameter, rows)
    assert local_part(placed) is rows
    assert (placed.device.type, placed.dtype, placed.shape) == ("cpu", rows.dtype, (5, 2))
    assert placed.placements == parameter.placements


def test_what_is_offloaded_stays_where_it_is() -> None:
    run_ranks(2, place_on_the_host)


@pytest.mark.parametrize("arch", ["llama3_1_70b", "llama3_1_405b"])
def test_large_models_are_counted_on_meta(arch: str) -> None:
    plan = [{"match": "layers.**", "kind": "qlora", "rank": 16, "alpha": 32}]
    model = llama(arch, plan, device="meta")
    base = [p for p in model.parameters() if not p.requires_grad]
    adapters = [p for p in model.parameters() if p.requires_grad]
    groups = group_bytes(model)
    assert sum(groups) == sum(p.nbytes for p in model.parameters())
    for num_ranks in (1, 2, 4, 8, 16, 32, 64):  # which divide all sizes of these bases
        held = sum(held_bytes(p, num_ranks) for p in base)
        assert num_ranks * held == sum(p.nbytes for p in base)
        held = sum(held_bytes(p, num_ranks) for p in adapters)
        rows = max(num_ranks, 16)  # of an A: each rank holds as many as the first
        padded = [p.nbytes * rows // 16 if p.shape[0] == 16 else p.nbytes for p in adapters]
        assert num_ranks * held == sum(padded)


def test_what_cannot_be_shared_out_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"shard=3 does not divide the 4 processes of this run"):
        sharding(Ranks(size=4), "cpu", shard=3, cpu_offload=False)
    with pytest.raises(ConfigError, match=r"shard=2 does not divide the one process of this run"):
        sharding(Ranks(), "cpu", shard=2, cpu_offload=False)
    with pytest.raises(ConfigError, match=r"cpu_offload=true takes --nproc-per-node"):
        sharding(Ranks(), "cpu", shard=None, cpu_offload=True)
    assert sharding(Ranks(), "cpu", shard=1, cpu_offload=False) is None
