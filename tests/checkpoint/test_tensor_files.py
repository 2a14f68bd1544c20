"""Safetensors files in and out: tensor by tensor, as pages of the file, read ahead, finite."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from shared import FROZEN, Checkpoints, as_stored, assert_same_bits, checkpoints, refused
from test_native_nf4 import PLAN
from torch import Tensor

from qlora_builders.checkpoint import load_checkpoint, save_checkpoint, tensor_files
from qlora_builders.checkpoint.tensor_files import (
    READERS,
    LazyTensor,
    find_tensors,
    is_finite,
    open_tensors,
    stream,
    write_shards,
    write_tensors,
)
from qlora_builders.errors import CheckpointError
from qlora_builders.modules import CausalLM

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, or uses MADV")


# ---- written ------------------------------------------------------------------------------------


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
        assert torch.equal(open_tensors(tmp_path)[name].load(), torch.full((10,), float(i)))


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


# ---- mapped: our own files are shared, never written back, safe to replace -----------------------


@pytest.fixture
def native(tmp_path: Path) -> Path:
    model = load_checkpoint(checkpoints("biased"), PLAN, dtype=torch.float32)
    save_checkpoint(model, tmp_path / "nf4", format="nf4")
    return tmp_path / "nf4"


def load(native: Path, **options: object) -> CausalLM:
    return as_stored(native, dtype=torch.float32, **options)


def mapped_here(file: Path) -> int:
    return Path("/proc/self/maps").read_bytes().count(os.fsencode(file))


@on_linux
def test_mapped_as_long_as_a_weight_lives(native: Path) -> None:
    model = load(native)
    assert mapped_here(native / "nf4.safetensors") == 1
    del model
    assert mapped_here(native / "nf4.safetensors") == 0


@on_linux
def test_what_is_cast_or_dequantized_is_not_mapped(native: Path) -> None:
    model = load_checkpoint(native, dtype=torch.bfloat16)
    assert mapped_here(native / "nf4.safetensors") == 0
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_training_a_mapped_weight_leaves_the_file(native: Path) -> None:
    before = (native / "nf4.safetensors").read_bytes()
    model = load(native, train=["embed_tokens"])
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(1)
        for parameter in model.parameters():
            if not parameter.requires_grad and type(parameter) is torch.nn.Parameter:
                parameter.mul_(2)
    assert (native / "nf4.safetensors").read_bytes() == before
    assert_same_bits(load(native), load(native), quantized=13)


def test_saving_over_the_directory_in_use(native: Path) -> None:
    """The name goes to new files; the model keeps the ones that it maps."""
    model, again = load(native), load(native)
    with torch.no_grad():
        again.model.norm.weight.add_(1)
    save_checkpoint(again, native, format="nf4")
    torch.testing.assert_close(
        load(native).model.norm.weight, model.model.norm.weight + 1, rtol=0, atol=0
    )


@on_linux
def test_a_file_that_shrank_before_it_is_read(tmp_path: Path) -> None:
    """The kernel says so, where touching the page would have killed the process."""
    tensor = torch.arange(100_000)
    write_tensors({"a": tensor}, tmp_path / "model.safetensors")
    (stored,) = open_tensors(tmp_path, mappable=True).values()
    assert stored.map is not None
    assert torch.equal(stored.map(), tensor)
    os.truncate(tmp_path / "model.safetensors", 4096)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: a cannot be read: it has shrunk"
    ):
        stored.map()


@on_linux
def test_a_kernel_without_populate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files, "_MADV_POPULATE_READ", 12345)
    write_tensors({"a": torch.arange(3)}, tmp_path / "model.safetensors")
    (stored,) = open_tensors(tmp_path).values()
    assert stored.map is not None
    assert stored.map().tolist() == [0, 1, 2]


def test_empty_and_crooked_tensors_are_read(tmp_path: Path) -> None:
    """Nothing to map, or elements across the alignment of their type."""
    header = (
        b'{"e":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
        b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"b":{"dtype":"F32","shape":[1],"data_offsets":[1,5]}}'
    )
    header += b" " * (-len(header) % 8)
    data = b"\7" + torch.tensor([2.5]).numpy().tobytes()
    content = len(header).to_bytes(8, "little") + header + data
    (tmp_path / "model.safetensors").write_bytes(content)
    tensors = open_tensors(tmp_path, mappable=True)
    assert {name for name, tensor in tensors.items() if tensor.map} == {"a", "b"}
    assert tensors["b"].load().tolist() == [2.5]
    assert tensors["e"].load().tolist() == []


# ---- read ahead, in order, within the bound ------------------------------------------------------


SIZES = [3, 100, 1, 40, 40, 20, 7, 100, 2, 60, 30, 9]


class Source:
    """Lazy tensors that record how much of them is in memory at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.alive: list[int] = []  # sizes of what is loaded and not consumed
        self.most = self.most_tensors = 0
        self.threads: set[int] = set()
        self.tensors = [
            LazyTensor(str(i), torch.Size([size]), torch.uint8, partial(self.load, i, size))
            for i, size in enumerate(SIZES)
        ]

    def load(self, index: int, size: int) -> Tensor:
        with self.lock:
            self.threads.add(threading.get_ident())
            self.alive.append(size)
            self.most = max(self.most, sum(self.alive))
            self.most_tensors = max(self.most_tensors, len(self.alive))
        time.sleep(0.002 * (index % 3))
        return torch.full((size,), index, dtype=torch.uint8)

    def consumed(self, tensor: LazyTensor) -> None:
        with self.lock:
            self.alive.remove(tensor.nbytes)


def test_order_values_and_bound() -> None:
    source, seen = Source(), []

    def consume(tensor: LazyTensor, value: Tensor) -> None:
        time.sleep(0.003)  # the readers get ahead
        seen.append((tensor.name, value.tolist()))
        source.consumed(tensor)

    stream(source.tensors, consume, transient=lambda tensor: True)
    assert seen == [(str(i), [i] * size) for i, size in enumerate(SIZES)]
    assert source.most <= max(SIZES)
    assert source.most_tensors <= READERS + 1
    assert threading.get_ident() not in source.threads
    assert source.most_tensors == READERS + 1  # and they do read ahead


def test_what_is_kept_is_no_page_of_a_file_that_may_change() -> None:
    ways = {way: partial(torch.tensor, [ord(way)], dtype=torch.uint8) for way in "lm"}
    one = LazyTensor("", torch.Size([1]), torch.uint8, ways["l"], map=ways["m"])
    tensors = [
        replace(one, name=kept + own, mappable=own == "own")
        for kept in ("kept", "")
        for own in ("own", "")
    ]
    came = {}
    stream(
        tensors,
        lambda tensor, value: came.update({tensor.name: chr(value.item())}),
        transient=lambda tensor: not tensor.name.startswith("kept"),
    )
    assert came == {"keptown": "m", "kept": "l", "own": "m", "": "m"}


@pytest.mark.parametrize("failing", ["load", "consume"])
def test_an_error_stops_the_reading(failing: str) -> None:
    source = Source()
    before = set(threading.enumerate())  # other libraries leave some

    def broken() -> Tensor:
        raise CheckpointError("the disk is gone")

    if failing == "load":
        source.tensors[2] = LazyTensor("2", torch.Size([1]), torch.uint8, broken)
    seen = []

    def consume(tensor: LazyTensor, value: Tensor) -> None:
        source.consumed(tensor)
        seen.append(tensor.name)
        if failing == "consume" and tensor.name == "2":
            raise CheckpointError("the disk is gone")

    refused("the disk is gone", stream, source.tensors, consume, transient=lambda tensor: False)
    assert seen == ["0", "1", "2"][: 2 if failing == "load" else 3]
    assert not set(threading.enumerate()) - before


def test_loading_is_deterministic() -> None:
    first = load_checkpoint(checkpoints(sharded=True), [FROZEN])
    for _ in range(5):
        assert_same_bits(load_checkpoint(checkpoints(sharded=True), [FROZEN]), first, quantized=14)


def test_a_file_that_shrinks_while_it_is_read(own_copy: Checkpoints) -> None:
    """An error that names file and tensor."""
    path = own_copy()
    tensors = open_tensors(path)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    for name, tensor in tensors.items():
        for read in (tensor.load, tensor.map):
            refused(
                rf"safetensors: {name} cannot be read: ",
                read,
            )


# ---- finite --------------------------------------------------------------------------------------


EDGES = (0.0, -0.0, float("inf"), -float("inf"), float("nan"), -float("nan"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number(dtype: torch.dtype) -> None:
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    finite = numbers[numbers.isfinite()]
    assert is_finite(finite)
    assert [is_finite(x) for x in numbers.split(1)] == numbers.isfinite().tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1, -1])
def test_one_number_among_others(dtype: torch.dtype, sign: int) -> None:
    largest = torch.finfo(dtype).max
    for number in (*EDGES, largest, -largest, torch.finfo(dtype).tiny):
        tensor = sign * torch.rand(40, 5).to(dtype)
        tensor[7, 3] = number
        expected = bool(torch.isfinite(tensor).all())
        assert is_finite(tensor) == is_finite(tensor.t()) == expected, number
        assert is_finite(tensor[:7])
    assert is_finite(torch.nn.Parameter(torch.ones(2)))
    assert is_finite(torch.empty(0, 4))
