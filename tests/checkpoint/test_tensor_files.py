"""Safetensors files in and out: one tensor at a time, what the library lets pass refused."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qlora_builders.checkpoint.tensor_files import (
    LazyTensor,
    find_tensors,
    read_tensor,
    write_shards,
)


def lazy(name: str, value: float, load: Callable | None = None) -> LazyTensor:
    tensor = torch.full((10,), float(value))
    return LazyTensor(name, tensor.shape, tensor.dtype, load or (lambda: tensor))  # 40 bytes


def test_single_file(tmp_path: Path) -> None:
    write_shards([lazy("a", 1), lazy("b", 2)], tmp_path, max_shard_bytes=80)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert set(find_tensors(tmp_path)) == {"a", "b"}
    with safe_open(tmp_path / "model.safetensors", "pt") as handle:
        assert handle.metadata() == {"format": "pt"}  # transformers asks for it


def test_shards_and_index(tmp_path: Path) -> None:
    tensors = [lazy(name, i) for i, name in enumerate("abcde")]
    write_shards(tensors, tmp_path, max_shard_bytes=80)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert index["metadata"]["total_size"] == 200
    expected = [shards[0], shards[0], shards[1], shards[1], shards[2]]
    assert index["weight_map"] == dict(zip("abcde", expected, strict=True))
    assert [len(load_file(tmp_path / shard)) for shard in shards] == [2, 2, 1]
    for i, name in enumerate("abcde"):
        assert torch.equal(
            read_tensor(find_tensors(tmp_path)[name], name), torch.full((10,), float(i))
        )


def test_tensor_larger_than_a_shard_gets_its_own(tmp_path: Path) -> None:
    write_shards([lazy(name, 0) for name in "abc"], tmp_path, max_shard_bytes=1)
    assert len(list(tmp_path.glob("model-*-of-00003.safetensors"))) == 3


@pytest.mark.parametrize("max_shard_bytes", [40, 1000])
def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path, max_shard_bytes: int) -> None:
    alive: list[weakref.ref] = []  # the memory behind the tensors
    seen = []

    def load() -> torch.Tensor:
        memory = np.zeros(10, dtype=np.float32)
        alive.append(weakref.ref(memory))
        seen.append(sum(ref() is not None for ref in alive))
        return torch.from_numpy(memory)

    tensors = [lazy(name, 0, load) for name in "abc"]
    write_shards(tensors, tmp_path, max_shard_bytes=max_shard_bytes)
    assert seen == [1, 1, 1]
