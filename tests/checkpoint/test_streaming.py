"""Reading ahead: in order, within the bound, and errors come out at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qlora_builders.checkpoint import load_checkpoint
from qlora_builders.checkpoint import streaming as streaming_module
from qlora_builders.checkpoint.safetensors_io import LazyTensor, open_tensors
from qlora_builders.checkpoint.streaming import READERS, stream
from qlora_builders.errors import CheckpointError
from qlora_builders.tensor import NF4Tensor

SIZES = [3, 100, 1, 40, 40, 20, 7, 100, 2, 60, 30, 9]


class Source:
    """Lazy tensors that record how much of them is in memory at a time."""

    def __init__(self, *, into: bool) -> None:
        self.lock = threading.Lock()
        self.alive = self.most = self.most_tensors = self.tensors_alive = 0
        self.threads: set[int] = set()
        self.tensors = [self.lazy(i, size, into) for i, size in enumerate(SIZES)]

    def lazy(self, index: int, size: int, into: bool) -> LazyTensor:
        def load(buffer: Tensor | None = None) -> Tensor:
            with self.lock:
                self.threads.add(threading.get_ident())
                self.alive += size
                self.tensors_alive += 1
                self.most = max(self.most, self.alive)
                self.most_tensors = max(self.most_tensors, self.tensors_alive)
            time.sleep(0.002 * (index % 3))
            value = torch.empty(size, dtype=torch.uint8) if buffer is None else buffer
            return value.fill_(index)

        shape = torch.Size([size])
        return LazyTensor(str(index), shape, torch.uint8, load, load_into=load if into else None)

    def consumed(self, tensor: LazyTensor) -> None:
        with self.lock:
            self.alive -= tensor.nbytes
            self.tensors_alive -= 1


@pytest.mark.parametrize("into", [False, True])
def test_order_values_and_bound(into: bool) -> None:
    source, seen = Source(into=into), []

    def consume(tensor: LazyTensor, value: Tensor) -> None:
        time.sleep(0.003)  # the readers get ahead
        seen.append((tensor.name, value.tolist()))
        source.consumed(tensor)

    stream(source.tensors, consume, transient=lambda tensor: True)
    assert seen == [(str(i), [i] * size) for i, size in enumerate(SIZES)]
    assert source.most <= max(SIZES)
    assert source.most_tensors <= READERS + 1
    assert threading.get_ident() not in source.threads
    if not into:
        assert source.most_tensors == READERS + 1  # and they do read ahead


def test_memory_is_reused_only_for_transient_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    source, kept, made = Source(into=True), {}, []
    scratch = streaming_module._scratch

    def counting(nbytes: int) -> Tensor:
        made.append(nbytes)
        return scratch(nbytes)

    monkeypatch.setattr(streaming_module, "_scratch", counting)

    def consume(tensor: LazyTensor, value: Tensor) -> None:
        kept[tensor.name] = value
        source.consumed(tensor)

    stream(source.tensors, consume, transient=lambda tensor: tensor.nbytes < 50)
    assert set(made) == {40}
    assert len(made) <= READERS + 1
    for index, size in enumerate(SIZES):
        if size >= 50:
            assert kept[str(index)].tolist() == [index] * size


@pytest.mark.parametrize("failing", ["load", "consume"])
def test_an_error_stops_the_reading(failing: str) -> None:
    source = Source(into=False)
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


def test_loading_is_deterministic(checkpoints: Callable[..., Path]) -> None:
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


def test_a_file_that_shrinks_while_it_is_read(own_copy: Callable[..., Path]) -> None:
    """An error that names file and tensor; with a mapped file it would be a bus error."""
    path = own_copy()
    tensors = open_tensors(path)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    last = max(tensors.values(), key=lambda t: t.load.args[2].start)
    with pytest.raises(CheckpointError, match=f"{last.name} cannot be read: the file"):
        last.load()
