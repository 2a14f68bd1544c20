"""Which reader a directory gets, and what an explicit format changes."""

from __future__ import annotations

from pathlib import Path

import pytest
from shared import checkpoints

from qlora_builders.checkpoint import (
    load_checkpoint,
    read_arch,
    read_tensors,
    save_checkpoint,
    stored_plan,
)
from qlora_builders.checkpoint.formats import detect_format
from qlora_builders.errors import CheckpointError

NF4 = [{"match": "layers.**", "kind": "frozen_nf4"}]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model in each format that we write."""
    path = tmp_path_factory.mktemp("formats")
    model = load_checkpoint(checkpoints(), NF4)
    for format in ("hf", "nf4", "bnb-4bit"):
        save_checkpoint(model, path / format, format=format)
    return {format: path / format for format in ("hf", "nf4", "bnb-4bit")}


def test_detected(directories: dict[str, Path]) -> None:
    for format, path in directories.items():
        assert detect_format(path) == format
        assert read_arch(path) == read_arch(path, format=format) == read_arch(directories["hf"])
        names = {name for name, t in read_tensors(path).items() if t.quantized}
        assert len(names) == (0 if format == "hf" else 14)
        assert len(stored_plan(path)) == len(names)

    shapes = [
        {name: (t.shape, t.dtype) for name, t in read_tensors(path).items()}
        for path in directories.values()
    ]
    assert shapes[0] == shapes[1] == shapes[2]


def test_override(directories: dict[str, Path]) -> None:
    load_checkpoint(directories["nf4"], NF4, format="nf4")
    with pytest.raises(CheckpointError, match="format is 'hf', but the directory is 'nf4'"):
        load_checkpoint(directories["nf4"], NF4, format="hf")
    with pytest.raises(CheckpointError, match="format is 'bnb4bit'; did you mean 'bnb-4bit'"):
        load_checkpoint(directories["nf4"], NF4, format="bnb4bit")
    with pytest.raises(CheckpointError, match=r"params\.json: missing; expected .* Meta's layout"):
        load_checkpoint(directories["nf4"], NF4, format="meta")


def test_not_a_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        read_arch(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="no such directory"):
        read_tensors(tmp_path / "gone", format="meta")
