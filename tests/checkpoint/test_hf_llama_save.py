"""save_checkpoint: what transformers and we read back, and what a failure leaves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shared import assert_same_files, checkpoints, logits, reference

from qlora_builders.checkpoint import load_checkpoint, read_arch, save_checkpoint, tensor_files
from qlora_builders.errors import CheckpointError

NF4 = [{"match": "layers.**", "kind": "frozen_nf4"}]


@pytest.mark.parametrize("variant", ["gqa", "tied", "biased", "linear_rope"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 30_000])
@pytest.mark.parametrize("with_companions", [False, True])
def test_transformers_gives_our_logits(
    tmp_path: Path, variant: str, max_shard_bytes: int, with_companions: bool
) -> None:
    """Without companions config.json is ours alone."""
    source = checkpoints(variant)
    model = load_checkpoint(source, NF4, dtype=torch.float32)
    out = tmp_path / "out"
    companions = source if with_companions else None
    save_checkpoint(model, out, max_shard_bytes=max_shard_bytes, companions=companions)
    assert (out / "model.safetensors.index.json").exists() == (max_shard_bytes < 10**9)
    torch.testing.assert_close(logits(reference(out)), logits(model), rtol=1e-5, atol=2e-5)
    assert read_arch(out) == read_arch(source)


def test_plain_round_trip_is_exact(tmp_path: Path) -> None:
    source = checkpoints("biased", torch.bfloat16)
    save_checkpoint(load_checkpoint(source), tmp_path / "out")
    assert_same_files(source / "model.safetensors", tmp_path / "out/model.safetensors")


def test_tied_head_is_written_once(tmp_path: Path) -> None:
    save_checkpoint(load_checkpoint(checkpoints("tied")), tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")


def test_dtype(tmp_path: Path) -> None:
    model = load_checkpoint(checkpoints(), NF4, train=["norm"])
    save_checkpoint(model, tmp_path / "own")
    stored = load_file(tmp_path / "own/model.safetensors")
    assert stored.pop("model.norm.weight").dtype == torch.float32  # it trains
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "own/config.json").read_text())["torch_dtype"] == "bfloat16"

    save_checkpoint(model, tmp_path / "half", dtype=torch.float16)
    stored = load_file(tmp_path / "half/model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert json.loads((tmp_path / "half/config.json").read_text())["torch_dtype"] == "float16"


def test_companions(tmp_path: Path) -> None:
    source = checkpoints()
    save_checkpoint(load_checkpoint(source), tmp_path / "out", companions=source)
    names = {
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"
    }  # fmt: skip
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert written == names | {"config.json", "model.safetensors"}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (5, [6, 7])
    assert "dtype" not in config  # the source's: it would contradict torch_dtype


def test_config_is_the_models_and_not_the_companions(tmp_path: Path) -> None:
    source = checkpoints("biased")
    arch = replace(read_arch(source), rope_theta=1e6, rope_scaling=None)
    model = load_checkpoint(source, arch=arch)
    save_checkpoint(model, tmp_path / "out", companions=source)
    assert read_arch(tmp_path / "out") == arch


def test_refused(tmp_path: Path) -> None:
    qlora = {"match": "layers.*.mlp.*", "kind": "qlora", "rank": 2, "alpha": 2}
    model = load_checkpoint(checkpoints(), [qlora])
    with pytest.raises(CheckpointError, match="has LoRA adapters; write them with save_adapter"):
        save_checkpoint(model, tmp_path / "out")
    with pytest.raises(
        CheckpointError, match="format is 'gguf'; allowed: bnb-4bit, hf, native, nf4"
    ):
        save_checkpoint(model, tmp_path / "out", format="gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("existing", [False, True])
def test_failure_while_writing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    model = load_checkpoint(checkpoints())
    out = tmp_path / "out"
    if existing:
        save_checkpoint(model, out)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    written = []
    write_file = tensor_files.write_file

    def full_disk(tensors: list, file: Path) -> None:
        if written:
            raise OSError("no space left on device")
        written.append(file)
        write_file(tensors, file)

    monkeypatch.setattr(tensor_files, "write_file", full_disk)
    with pytest.raises(CheckpointError, match="out: cannot be written: no space left"):
        save_checkpoint(model, out, max_shard_bytes=30_000)
    assert written  # it failed halfway, not at the start
    after = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert after == before
    assert list(tmp_path.iterdir()) == ([out] if existing else [])


def test_existing_checkpoint_is_replaced(tmp_path: Path) -> None:
    model = load_checkpoint(checkpoints())
    save_checkpoint(model, tmp_path / "out", max_shard_bytes=30_000)
    save_checkpoint(model, tmp_path / "out")
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == ["config.json", "model.safetensors"]
