"""Checkpoints of every format into sharded models: the bits of the unsharded one, a share read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor

from qlora_builders import load_checkpoint, save_checkpoint
from qlora_builders.checkpoint import base_record, tensor_files
from qlora_builders.distributed import Ranks, make_mesh, shard_model, whole_parameters
from qlora_builders.errors import CheckpointError
from qlora_builders.tensor import NF4Tensor
from qlora_builders.tensor.sharded import is_sharded, local_part, whole_tensor

PLAN = [
    {"match": "layers.**", "kind": "frozen_nf4", "block_size": 32, "scale_block_size": 5},
    {"match": "layers.*.self_attn.{q,v}_proj", "kind": "qlora", "rank": 3, "alpha": 4},
    {"match": "layers.1.mlp.up_proj", "kind": "frozen_nf4", "scale_format": "bnb"},
    {"match": "layers.1.mlp.down_proj", "kind": "frozen_nf4", "scale_format": "none"},
    {"match": "lm_head", "kind": "linear", "trainable": True},
]
STORED = [{"match": "layers.*.{self_attn,mlp}.*", "kind": "frozen_nf4"}]


def fields(tensor: torch.Tensor) -> list[torch.Tensor]:
    if isinstance(tensor, NF4Tensor):
        return [getattr(tensor, name) for name in tensor.tensor_fields]
    return [tensor]


def load_both(ranks: Ranks, path: Path, plan: list[dict], shard: int | None) -> tuple[int, int]:
    """Compare bit for bit; returns (bytes read, bytes held) of this rank."""
    torch.manual_seed(0)
    whole = load_checkpoint(path, plan, dtype=torch.float16)
    read = [0]

    def counting(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(*args: Any) -> Tensor:
            tensor = original(*args)
            read[0] += tensor.nbytes
            return tensor

        return counted

    tensor_files._read_rows = counting(tensor_files._read_rows)
    tensor_files._map = counting(tensor_files._map)
    base_record._WINDOWS = 2  # the sample that is hashed would be most of so small a model
    torch.manual_seed(0)
    mesh = make_mesh(ranks, "cpu", shard=shard)
    model = load_checkpoint(path, plan, dtype=torch.float16, shard=partial(shard_model, mesh=mesh))
    held = 0
    for (name, ours), (_, theirs) in zip(
        model.named_parameters(), whole.named_parameters(), strict=True
    ):
        assert is_sharded(ours)
        assert ours.requires_grad == theirs.requires_grad
        gathered = whole_tensor(ours)
        assert gathered.dtype == theirs.dtype
        for a, b in zip(fields(gathered), fields(theirs), strict=True):
            assert torch.equal(a, b), name
        held += local_part(ours).nbytes
    ids = torch.arange(8).view(1, -1)
    assert torch.equal(model(ids), whole(ids))
    with whole_parameters(model, ranks, only_trained=False):
        if ranks.is_main:
            for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
                assert all(map(torch.equal, fields(ours), fields(theirs)))
            state, expected = model.state_dict(), whole.state_dict()  # plain, both of them
            assert list(state) == list(expected)
            assert all(torch.equal(state[name], expected[name]) for name in expected)
    return read[0], held


@pytest.mark.parametrize(
    ("world_size", "shard"),
    [
        (2, 2),
        pytest.param(3, 3, marks=pytest.mark.slow),
        (4, 2),
        pytest.param(2, 1, marks=pytest.mark.slow),
    ],
)
def test_a_sharded_model_has_the_bits_of_the_whole(base: Path, world_size: int, shard: int) -> None:
    found = run_ranks(world_size, load_both, base, PLAN, shard)
    size = (base / "model.safetensors").stat().st_size
    if shard == world_size == 2:  # plain tensors are read in halves, of `bnb` scales all
        assert all(read < 0.6 * size for read, _ in found)


@pytest.mark.parametrize("format", ["nf4", "bnb-4bit"])
def test_stored_codes_are_sharded_as_they_are(base: Path, tmp_path: Path, format: str) -> None:
    model = load_checkpoint(base, PLAN[:1], dtype=torch.float16)
    save_checkpoint(model, tmp_path / "stored", format=format)
    run_ranks(2, load_both, tmp_path / "stored", STORED, None)


def load_damaged(ranks: Ranks, path: Path) -> str:
    mesh = make_mesh(ranks, "cpu")
    try:
        load_checkpoint(path, PLAN, shard=partial(shard_model, mesh=mesh))
    except CheckpointError as error:
        return str(error)
    return ""


def test_what_is_wrong_with_a_weight_is_said_by_who_reads_it(base: Path, tmp_path: Path) -> None:
    model = load_checkpoint(base)
    model.model.layers[0].mlp.gate_proj.weight.data[-1, -1] = torch.nan
    save_checkpoint(model, tmp_path / "damaged")
    first, last = run_ranks(2, load_damaged, tmp_path / "damaged")
    assert first == ""
    assert "model.safetensors: model.layers.0.mlp.gate_proj.weight: the weight has NaN" in last
