"""Our own NF4 directories: nothing is quantized twice, no bit moves, nobody else reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from shared import (
    DTYPES,
    FROZEN,
    as_stored,
    assert_same_bits,
    assert_same_files,
    checkpoints,
    dequantized,
    edit_json,
    edit_tensors,
    logits,
    refused,
    stored,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora_builders.checkpoint import load_checkpoint, read_arch, save_checkpoint
from qlora_builders.errors import CheckpointError
from qlora_builders.kernels import NF4
from qlora_builders.tensor import NF4Tensor

SMALL = {"block_size": 32, "scale_block_size": 5, "scale_search": True}
PLAN = [
    FROZEN,
    FROZEN | {"match": "layers.0.self_attn.*", "scale_format": "bnb"},
    FROZEN | {"match": "layers.*.mlp.up_proj", "scale_format": "none"},
    FROZEN | {"match": "layers.1.self_attn.*", **SMALL},
    {"match": "layers.1.mlp.gate_proj", "kind": "linear"},
]


@pytest.fixture
def native(tmp_path: Path) -> Path:
    """The test may damage it."""
    save_checkpoint(load_checkpoint(checkpoints(), PLAN), tmp_path / "nf4", format="nf4")
    return tmp_path / "nf4"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", ["biased", "tied"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 10_000])
def test_reload_is_bit_identical(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variant: str,
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> None:
    source = checkpoints(variant)
    model = load_checkpoint(source, PLAN, dtype=dtype)
    save_checkpoint(model, tmp_path / "nf4", format="nf4", max_shard_bytes=max_shard_bytes)
    files = list((tmp_path / "nf4").glob("nf4*.safetensors"))
    assert (len(files) > 3) == (max_shard_bytes == 10_000)
    assert read_arch(tmp_path / "nf4") == read_arch(source)

    def only_shapes(weight: Tensor, **options: Any) -> tuple[Tensor, ...]:
        assert weight.is_meta, "a stored weight was quantized again"
        return quantize(weight, **options)

    quantize = NF4.quantize
    monkeypatch.setattr(NF4, "quantize", only_shapes)
    reloaded = as_stored(tmp_path / "nf4", dtype=dtype)
    assert_same_bits(model, reloaded, quantized=13)
    assert torch.equal(logits(model), logits(reloaded))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hf_native_hf_native_is_bit_stable(tmp_path: Path, dtype: torch.dtype) -> None:
    """HF -> NF4 -> native -> HF (upcast) -> NF4 -> native: the files are equal byte for byte."""
    plan = [FROZEN, FROZEN | {"match": "layers.*.mlp.*", "scale_format": "none"}]
    source = checkpoints("biased", dtype)
    files = []
    for i in range(3):
        model = load_checkpoint(source, plan, dtype=dtype)
        save_checkpoint(model, tmp_path / f"nf4-{i}", format="nf4")
        files.append((tmp_path / f"nf4-{i}/nf4.safetensors").read_bytes())
        source = tmp_path / f"hf-{i}"
        save_checkpoint(as_stored(tmp_path / f"nf4-{i}", dtype=dtype), source)
    assert files[0] == files[1] == files[2]
    assert_same_files(*(tmp_path / f"hf-{i}/model.safetensors" for i in (0, 2)))


def test_bitsandbytes_scales_survive_the_native_layout(tmp_path: Path) -> None:
    model = load_checkpoint(checkpoints(), [FROZEN | {"scale_format": "bnb"}])
    for i, format in enumerate(("bnb-4bit", "nf4", "bnb-4bit")):
        save_checkpoint(model, tmp_path / str(i), format=format)
        model = as_stored(tmp_path / str(i))
    assert_same_files(*(tmp_path / i / "model.safetensors" for i in "02"))


def test_what_is_written(tmp_path: Path) -> None:
    source = checkpoints("biased")
    model = load_checkpoint(source, PLAN)
    save_checkpoint(model, tmp_path / "nf4", format="nf4", companions=source, dtype=torch.float32)
    config = json.loads((tmp_path / "nf4/config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "qlora_builders_nf4", "version": 1}
    assert config["eos_token_id"] == [6, 7]
    assert (tmp_path / "nf4/tokenizer.json").exists()
    tensors = stored(tmp_path / "nf4")
    up = model.model.layers[0].mlp.up_proj
    key = "model.layers.0.mlp.up_proj.weight"
    assert key not in tensors
    for field in NF4Tensor.tensor_fields:
        assert torch.equal(tensors[f"{key}.{field}"], getattr(up.weight, field))
    head = json.loads(bytes(tensors[f"{key}.nf4"].numpy()))
    del head["crc32"]
    assert head == {
        "version": 1, "shape": [96, 64], "dtype": "bfloat16", "block_size": 64,
        "scale_block_size": 256, "scale_format": "none", "scale_search": False,
    }  # fmt: skip
    # `dtype` is for the plain tensors; the bfloat16 bias came from a float32 file
    assert tensors["model.layers.0.mlp.up_proj.bias"].dtype == torch.float32


def test_other_tools_do_not_take_it_for_a_checkpoint(native: Path) -> None:
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(native)


def test_plain_plan_dequantizes(native: Path) -> None:
    plain = load_checkpoint(native)
    for name, parameter in as_stored(native).named_parameters():
        assert torch.equal(plain.get_parameter(name), dequantized(parameter)), name


def test_what_is_refused(native: Path, tmp_path: Path) -> None:
    for format in ("nf4", "bnb-4bit"):
        with pytest.raises(CheckpointError, match=f"format is '{format}', but no weight is in NF4"):
            save_checkpoint(load_checkpoint(native), tmp_path / "out", format=format)
    method = {"quant_method": "qlora_builders_nf4", "version": 2}
    edit_json(native / "config.json", {"quantization_config": method})
    refused("version 2 of qlora_builders_nf4; this release", load_checkpoint, native)


def test_damage_is_named(native: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight.codes"
    edit_tensors(native / "nf4.safetensors", {name: stored(native)[name] ^ 16})
    refused(r"nf4\.safetensors: model\.layers\.1\.mlp.*: the ch", as_stored, native)
