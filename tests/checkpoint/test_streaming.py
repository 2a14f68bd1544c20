"""Reading ahead: in order, within the bound, and errors come out at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch
from shared import Checkpoints
from torch import Tensor

from qlora_builders.checkpoint import load_checkpoint
from qlora_builders.checkpoint.placing import READERS, stream
from qlora_builders.checkpoint.tensor_files import LazyTensor, open_tensors
from qlora_builders.errors import CheckpointError
from qlora_builders.tensor import NF4Tensor

SIZES = [3, 100, 1, 40, 40, 20, 7, 100, 2, 60, 30, 9]


class Source:
    """Lazy tensors that record how much of them is in memory at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.alive = self.most = self.most_tensors = self.tensors_alive = 0
        self.threads: set[int] = set()
        self.tensors = [self.lazy(i, size) for i, size in enumerate(SIZES)]

    def lazy(self, index: int, size: int) -> LazyTensor:
        def load() -> Tensor:
            with self.lock:
                self.threads.add(threading.get_ident())
                self.alive += size
                self.tensors_alive += 1
                self.most = max(self.most, self.alive)
                self.most_tensors = max(self.most_tensors, self.tensors_alive)
            time.sleep(0.002 * (index % 3))
            return torch.full((size,), index, dtype=torch.uint8)

        shape = torch.Size([size])
        return LazyTensor(str(index), shape, torch.uint8, load)

    def consumed(self, tensor: LazyTensor) -> None:
        with self.lock:
            self.alive -= tensor.nbytes
            self.tensors_alive -= 1


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
    def lazy(name: str, mappable: bool) -> LazyTensor:
        def ways(way: str) -> Callable[[], Tensor]:
            return lambda: torch.tensor([ord(way)], dtype=torch.uint8)

        shape, dtype = torch.Size([1]), torch.uint8
        return LazyTensor(name, shape, dtype, ways("l"), map=ways("m"), mappable=mappable)

    came = {}
    tensors = [lazy(f"{kept}{own}", own == "own") for kept in ("kept", "") for own in ("own", "")]
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

    with pytest.raises(CheckpointError, match="the disk is gone"):
        stream(source.tensors, consume, transient=lambda tensor: False)
    assert seen == ["0", "1", "2"][: 2 if failing == "load" else 3]
    assert not set(threading.enumerate()) - before


def test_nothing_to_do() -> None:
    stream([], lambda tensor, value: None, transient=lambda tensor: True)


def test_loading_is_deterministic(checkpoints: Checkpoints) -> None:
    plan = [{"match": "layers.**", "kind": "frozen_nf4"}]
    first = dict(load_checkpoint(checkpoints(sharded=True), plan).named_parameters())
    for _ in range(5):
        model = load_checkpoint(checkpoints(sharded=True), plan)
        for name, parameter in model.named_parameters():
            if isinstance(parameter, NF4Tensor):
                assert torch.equal(parameter.codes, first[name].codes)
                assert torch.equal(parameter.scales, first[name].scales)
            else:
                assert torch.equal(parameter, first[name])


def test_a_file_that_shrinks_while_it_is_read(own_copy: Checkpoints) -> None:
    """An error that names file and tensor."""
    path = own_copy()
    tensors = open_tensors(path)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    for name, tensor in tensors.items():
        for read in (tensor.load, tensor.map):
            with pytest.raises(CheckpointError, match=rf"safetensors: {name} cannot be read: "):
                read()
