"""Weights in our own files are pages of the file: shared, never written back, safe to replace."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from shared import Checkpoints, assert_same_bits
from test_native_nf4 import PLAN

from qlora_builders.checkpoint import load_checkpoint, save_checkpoint, stored_plan, tensor_files
from qlora_builders.checkpoint.tensor_files import open_tensors, write_tensors
from qlora_builders.errors import CheckpointError
from qlora_builders.modules import CausalLM

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, or uses MADV")


@pytest.fixture
def native(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    model = load_checkpoint(checkpoints("biased"), PLAN, dtype=torch.float32)
    save_checkpoint(model, tmp_path / "nf4", format="nf4")
    return tmp_path / "nf4"


def load(native: Path, **options: object) -> CausalLM:
    return load_checkpoint(native, stored_plan(native), dtype=torch.float32, **options)


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
