"""Sharded tensors in safetensors files: parts of any number of ranks, read by any other number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_builders.distributed import Ranks
from qlora_builders.distributed.sharding import read_parts, stored_parts, write_parts
from qlora_builders.errors import CheckpointError

ROWS = (1, 2, 5, 7)  # fewer than ranks, and not a multiple of them


def wholes() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = {f"rows {n}": torch.randn(n, 3, generator=generator) for n in ROWS}
    vector = torch.randn(5, generator=generator, dtype=torch.float64)
    return weights | {"vector": vector, "bytes": torch.arange(6, dtype=torch.uint8)}


def sharded(tensors: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (ranks.size,))
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
