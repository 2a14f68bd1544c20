"""Sharded models: what a rank holds, reads and writes of them, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from archs import tiny_arch
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor

from qlora_builders import llama, load_checkpoint, save_checkpoint
from qlora_builders.checkpoint import base_record, tensor_files
from qlora_builders.distributed import (
    Ranks,
    group_bytes,
    make_mesh,
    shard_model,
    sharding,
    whole_parameters,
)
from qlora_builders.distributed.sharding import read_parts, stored_parts, write_parts
from qlora_builders.errors import CheckpointError, ConfigError
from qlora_builders.modules import CausalLM
from qlora_builders.tensor import format_of, gather
from qlora_builders.tensor.sharded import (
    held_bytes,
    held_rows,
    is_sharded,
    local_part,
    whole_tensor,
    with_local,
)

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
            assert all(map(torch.equal, fields(gather(ours)), fields(theirs))), name
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


LOADED = [
    {"match": "layers.**", "kind": "frozen_nf4", "block_size": 32, "scale_block_size": 5},
    {"match": "layers.*.self_attn.{q,v}_proj", "kind": "qlora", "rank": 3, "alpha": 4},
    {"match": "layers.1.mlp.up_proj", "kind": "frozen_nf4", "scale_format": "bnb"},
    {"match": "layers.1.mlp.down_proj", "kind": "frozen_nf4", "scale_format": "none"},
    {"match": "lm_head", "kind": "linear", "trainable": True},
]
STORED = [{"match": "layers.*.{self_attn,mlp}.*", "kind": "frozen_nf4"}]


def fields(tensor: Any) -> list[Tensor]:
    return [tensor] if format_of(tensor) is None else list(tensor.fields)


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
        assert all(map(torch.equal, fields(gathered), fields(theirs))), name
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


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(("world_size", "shard"), [(2, 2), slow(3, 3), (4, 2), slow(2, 1)])
def test_a_sharded_model_has_the_bits_of_the_whole(base: Path, world_size: int, shard: int) -> None:
    found = run_ranks(world_size, load_both, base, LOADED, shard)
    size = (base / "model.safetensors").stat().st_size
    if shard == world_size == 2:  # plain tensors are read in halves, of `bnb` scales all
        assert all(read < 0.6 * size for read, _ in found)


@pytest.mark.parametrize("format", ["nf4", "bnb-4bit"])
def test_stored_codes_are_sharded_as_they_are(base: Path, tmp_path: Path, format: str) -> None:
    model = load_checkpoint(base, LOADED[:1], dtype=torch.float16)
    save_checkpoint(model, tmp_path / "stored", format=format)
    run_ranks(2, load_both, tmp_path / "stored", STORED, None)


def load_damaged(ranks: Ranks, path: Path) -> str:
    mesh = make_mesh(ranks, "cpu")
    try:
        load_checkpoint(path, LOADED, shard=partial(shard_model, mesh=mesh))
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


ROWS = (1, 2, 5, 7)  # fewer than ranks, and not a multiple of them


def wholes() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = {f"rows {n}": torch.randn(n, 3, generator=generator) for n in ROWS}
    vector = torch.randn(5, generator=generator, dtype=torch.float64)
    return weights | {"vector": vector, "bytes": torch.arange(6, dtype=torch.uint8)}


def sharded(tensors: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    mesh = make_mesh(ranks, "cpu")
    return {name: distribute_tensor(t, mesh, [Shard(0)]) for name, t in tensors.items()}


def write(ranks: Ranks, folder: Path) -> None:
    write_parts(folder, sharded(wholes(), ranks))


def read(ranks: Ranks, folder: Path) -> dict[str, Tensor]:
    parts = sharded({name: torch.zeros_like(t) for name, t in wholes().items()}, ranks)
    read_parts(folder, parts)
    return {name: part.full_tensor() for name, part in parts.items()}  # type: ignore[attr-defined]


@pytest.fixture(scope="module", params=[1, 3, 4])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    run_ranks(request.param, write, folder)
    assert len(list(folder.iterdir())) == request.param  # no metadata beside the parts
    return folder


def test_a_process_alone_reads_what_any_number_of_ranks_wrote(folder: Path) -> None:
    expected = wholes()
    for name, stored in stored_parts(folder).items():
        assert (stored.size, stored.properties.dtype) == (
            expected[name].shape,
            expected[name].dtype,
        )
    tensors = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    read_parts(folder, tensors)
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_so_does_another_number_of_ranks(folder: Path) -> None:
    expected = wholes()
    for tensors in run_ranks(2, read, folder):
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_what_is_not_stored_so_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="rows 3 is missing"):
        read_parts(folder, {"rows 3": torch.zeros(3, 3)})
    message = r"rows 5 has shape \[5, 3\]; the model needs \[4, 3\]"
    with pytest.raises(CheckpointError, match=message):
        read_parts(folder, {"rows 5": torch.zeros(4, 3)})


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "shard-00001-model-00001-of-00001.safetensors"
    save_file({"a": torch.zeros(2)}, file, metadata={"DCP_SHARDING_INFO": "{}"})
    message = r"shard-\*.safetensors: cannot be read: KeyError"
    with pytest.raises(CheckpointError, match=message):
        read_parts(tmp_path, {"a": torch.zeros(2)})
    file.write_bytes(b"no header")
    with pytest.raises(CheckpointError, match=r"cannot be read: .*Safetensor"):
        stored_parts(tmp_path)


def write_to_two_places(ranks: Ranks, folder: Path) -> str:
    with pytest.raises(CheckpointError) as raised:
        write_parts(folder if ranks.is_main else folder / "file/below", sharded(wholes(), ranks))
    return str(raised.value)


def test_all_ranks_hear_that_one_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for message in run_ranks(2, write_to_two_places, tmp_path):
        assert "cannot be written: rank 1: " in message
        assert "Not a directory" in message


def test_the_files_are_plain_safetensors(tmp_path: Path) -> None:
    run_ranks(2, write, tmp_path)
    parts = [load_file(file)["rows 7"] for file in sorted(tmp_path.iterdir())]
    assert torch.equal(torch.cat(parts), wholes()["rows 7"])
