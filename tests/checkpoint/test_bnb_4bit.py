"""4-bit directories of transformers + bitsandbytes, in and out, against those two."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file
from shared import (
    DTYPES,
    FROZEN,
    as_stored,
    assert_same_files,
    checkpoints,
    edit_json,
    edit_tensors,
    logits,
    refused,
)
from torch import nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from qlora_builders.checkpoint import load_checkpoint, read_arch, save_checkpoint, stored_plan
from qlora_builders.errors import CheckpointError
from qlora_builders.models import llama
from qlora_builders.tensor import NF4Tensor

UP = "model.layers.1.mlp.up_proj"
BOTH_HEADS = pytest.mark.parametrize("variant", ["wide", "wide_tied"])


def quantized_by_transformers(path: Path, dtype: torch.dtype, **options: Any) -> LlamaForCausalLM:
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    config = BitsAndBytesConfig(**nf4 | options)
    return LlamaForCausalLM.from_pretrained(path, dtype=dtype, quantization_config=config)


def load_with_transformers(path: Path, dtype: torch.dtype) -> LlamaForCausalLM:
    model, info = LlamaForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def assert_same_model(ours: nn.Module, theirs: nn.Module, dtype: torch.dtype) -> None:
    """The same slots in NF4, the same bits of each, and logits. With gradients: without,
    bitsandbytes takes a bfloat16 kernel on some CPUs."""
    names = set()
    for name, parameter in ours.named_parameters():
        if isinstance(parameter, NF4Tensor):
            names.add(name.removesuffix(".weight"))
            weight = theirs.get_parameter(name)
            decoded = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
            assert torch.equal(parameter.dequantize(), decoded), name
    assert names == {n for n, m in theirs.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    ids = torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(1))
    expected = theirs(ids).logits
    tolerance = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    scale = expected.abs().max().item()
    torch.testing.assert_close(ours(ids), expected, rtol=0, atol=tolerance * scale)


# ---- in -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@BOTH_HEADS
def test_every_bit_and_logit_is_that_of_bitsandbytes(
    tmp_path: Path,
    nested: bool,
    storage: torch.dtype,
    dtype: torch.dtype,
    variant: str,
) -> None:
    theirs = quantized_by_transformers(
        checkpoints(variant),
        dtype,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_quant_storage=storage,
    )
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    plan = stored_plan(tmp_path / "theirs")
    ours = load_checkpoint(tmp_path / "theirs", plan, dtype=dtype)
    assert len(plan) == 14
    for name, parameter in ours.named_parameters():
        weight = theirs.get_parameter(name)
        if isinstance(parameter, NF4Tensor):
            assert torch.equal(parameter.codes, weight.data.view(-1).view(torch.uint8)), name
        else:
            assert torch.equal(parameter, weight), name
    assert_same_model(ours, theirs, dtype)


def test_skipped_modules(tmp_path: Path) -> None:
    theirs = quantized_by_transformers(
        checkpoints("wide"), torch.bfloat16, llm_int8_skip_modules=[UP, "lm_head"]
    )
    theirs.save_pretrained(tmp_path / "theirs")
    plan = stored_plan(tmp_path / "theirs")
    assert len(plan) == 13
    ours = load_checkpoint(tmp_path / "theirs", plan)
    assert torch.equal(ours.get_parameter(UP + ".weight"), theirs.get_parameter(UP + ".weight"))


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """Nested, in bfloat16; the test may damage it."""
    model = quantized_by_transformers(
        checkpoints("wide"), torch.bfloat16, bnb_4bit_use_double_quant=True
    )
    model.save_pretrained(tmp_path / "stored")
    return tmp_path / "stored"


def test_any_plan_loads(stored: Path) -> None:
    """Plain and LoRA slots get the dequantized weight, cast to the model's dtype."""
    exact = as_stored(stored)
    lora = {"rank": 2, "alpha": 2}
    plan = [
        {"match": "layers.0.**", "kind": "qlora", **lora},
        {"match": "layers.0.mlp.*", "kind": "frozen_nf4", "block_size": 64, "scale_format": "bnb"},
        {"match": "layers.1.mlp.*", "kind": "lora", **lora},
        {"match": "layers.1.mlp.up_proj", "kind": "linear", "trainable": True},
        {"match": "lm_head", "kind": "frozen_nf4", "block_size": 32},
    ]
    model = load_checkpoint(stored, plan)
    assert read_arch(stored) == model.spec.arch
    kinds = set()
    for name, parameter in exact.named_parameters():
        own = model.get_parameter(name)
        if not isinstance(parameter, NF4Tensor):
            continue
        kinds.add((type(own).__name__, own.dtype))
        if isinstance(own, NF4Tensor):
            assert torch.equal(own.codes, parameter.codes)
            assert torch.equal(own.dequantize(), parameter.dequantize())
        else:
            assert torch.equal(own, parameter.dequantize().to(own.dtype)), name
    assert kinds == {
        ("NF4Tensor", torch.bfloat16), ("Parameter", torch.bfloat16), ("Parameter", torch.float32)
    }  # fmt: skip
    assert model.lm_head.weight.format.block_size == 32  # stored plain, so the rule decides
    wide = as_stored(stored, dtype=torch.float32)
    own, expected = (m.get_parameter(UP + ".weight") for m in (wide, exact))
    assert own.dtype == torch.bfloat16  # as it is stored
    assert torch.equal(own.dequantize(), expected.dequantize())
    assert wide.model.norm.weight.dtype == torch.float32


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("format", ["bnb-4bit", "nf4"])
def test_the_tensors_of_a_file_are_a_strict_state_dict(
    stored: Path, tmp_path: Path, format: str, assign: bool
) -> None:
    """What bitsandbytes' own module cannot do with its own file."""
    expected = as_stored(stored)
    save_checkpoint(expected, tmp_path / "out", format=format)
    (file,) = (tmp_path / "out").glob("*.safetensors")
    rule = {"match": "layers.**", "kind": "qlora", "rank": 2, "alpha": 2, "scale_format": "bnb"}
    for plan in ([rule], [FROZEN | {"scale_format": "bnb"}]):
        model = llama(expected.spec.arch, plan, device="meta" if assign else "cpu")
        state = load_file(file)
        state |= {k: torch.zeros(v.shape) for k, v in model.state_dict().items() if ".lora_" in k}
        model.load_state_dict(state, strict=True, assign=assign)
        for name, parameter in expected.named_parameters():
            own = model.get_parameter(name)
            if isinstance(parameter, NF4Tensor):
                assert torch.equal(own.codes, parameter.codes), name
                assert torch.equal(own.dequantize(), parameter.dequantize()), name
            else:
                assert torch.equal(own, parameter), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 32}, "with block_size=64, but rule 'layers.[*][*]' asks for block_size=32"),
        ({"scale_format": "none"}, "with scale_format=bnb, but .* asks for scale_format=none"),
        ({"scale_search": True}, "with scale_search=False, but .* asks for scale_search=True"),
        (
            {"block_size": 128, "scale_block_size": 64},
            "with block_size=64, scale_block_size=256, but .* block_size=128, scale_block_size=64",
        ),
    ],
)
def test_rules_that_contradict_the_file(
    stored: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=f"is stored in NF4 {message}; leave the option out"):
        load_checkpoint(stored, [FROZEN | options])


# ---- out ----------------------------------------------------------------------------------------

PLANS = {
    "geometric": [FROZEN],
    "none": [FROZEN | {"scale_format": "none"}],
    "nested": [FROZEN | {"scale_format": "bnb"}],
    "mixed": [
        FROZEN | {"scale_format": "bnb"},
        FROZEN | {"match": "layers.0.mlp.*", "block_size": 32},
        {"match": "layers.1.mlp.up_proj", "kind": "linear"},
    ],
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@BOTH_HEADS
def test_transformers_loads_ours_and_gives_our_logits(
    tmp_path: Path, plan: str, dtype: torch.dtype, variant: str
) -> None:
    ours = load_checkpoint(checkpoints(variant), PLANS[plan], dtype=dtype)
    save_checkpoint(ours, tmp_path / "ours", format="bnb-4bit", companions=checkpoints(variant))
    assert_same_model(ours, load_with_transformers(tmp_path / "ours", dtype), dtype)
    back = as_stored(tmp_path / "ours", dtype=dtype)
    assert torch.equal(logits(back), logits(ours))
    assert read_arch(tmp_path / "ours") == read_arch(checkpoints(variant))


def test_a_quantized_head(tmp_path: Path) -> None:
    plan = [FROZEN, {"match": "lm_head", "kind": "frozen_nf4"}]
    ours = load_checkpoint(checkpoints("wide"), plan, dtype=torch.float32)
    save_checkpoint(ours, tmp_path / "ours", format="bnb-4bit")
    theirs = load_with_transformers(tmp_path / "ours", torch.float32)
    assert isinstance(theirs.lm_head, bnb.nn.Linear4bit)
    assert_same_model(ours, theirs, torch.float32)


def test_theirs_through_ours_is_the_same_file(stored: Path, tmp_path: Path) -> None:
    """Of one shard, tensor by tensor."""
    model = as_stored(stored)
    save_checkpoint(model, tmp_path / "ours", format="bnb-4bit", companions=stored)
    assert_same_files(stored / "model.safetensors", tmp_path / "ours/model.safetensors")
    config = json.loads((tmp_path / "ours/config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_use_double_quant"] is True
    assert config["quantization_config"]["llm_int8_skip_modules"] == ["lm_head"]


def test_upcast_drops_the_quantization_config(stored: Path, tmp_path: Path) -> None:
    model = as_stored(stored)
    save_checkpoint(model, tmp_path / "hf", companions=stored)
    assert "quantization_config" not in json.loads((tmp_path / "hf/config.json").read_text())
    theirs = load_with_transformers(tmp_path / "hf", torch.bfloat16)
    expected = model.get_parameter(UP + ".weight").dequantize()
    assert torch.equal(theirs.get_parameter(UP + ".weight"), expected)


# ---- refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"load_in_8bit": True}, "the weights are 8-bit; of bitsandbytes' formats only 4-bit NF4"),
        ({"load_in_4bit": False, "_load_in_4bit": False}, "the weights are not 4-bit"),
        ({"load_in_4bit": "no"}, "load_in_4bit is 'no'; expected true or false, or null"),
        ({"_load_in_8bit": 1}, "_load_in_8bit is 1; expected true or false, or null"),
        ({"bnb_4bit_quant_type": None}, "bnb_4bit_quant_type is None; expected a string"),
        ({"bnb_4bit_quant_type": ["nf4"]}, r"bnb_4bit_quant_type is \['nf4'\]; expected a string"),
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type is 'fp4'; of bitsandbytes' formats"),
        ({"quant_method": "gptq"}, "quant_method 'gptq'.; allowed: bitsandbytes, qlora_builders"),
        ({"quant_method": None}, "quantized in a way that cannot be read .quant_method None"),
    ],
)
def test_other_quantization(stored: Path, change: dict[str, Any], message: str) -> None:
    file = stored / "config.json"
    config = json.loads(file.read_text())["quantization_config"]
    edit_json(file, {"quantization_config": config | change})
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(stored)
    assert str(caught.value).startswith(f"{file}: ")


def test_fp4_and_8bit_files_of_transformers(tmp_path: Path) -> None:
    for name, options in {
        "fp4": {"bnb_4bit_quant_type": "fp4"},
        "8-bit": {"load_in_4bit": False, "load_in_8bit": True},
    }.items():
        quantized_by_transformers(checkpoints("wide"), torch.bfloat16, **options).save_pretrained(
            tmp_path / name
        )
        refused(f"{name}.*only 4-bit NF4 is read", load_checkpoint, tmp_path / name)
    # a config that hides it
    shutil.copytree(tmp_path / "fp4", tmp_path / "hidden")
    file = tmp_path / "hidden/config.json"
    file.write_text(file.read_text().replace('"fp4"', '"nf4"'))
    refused(r"proj\.weight is quantized to FP4; of bits", load_checkpoint, tmp_path / "hidden")


def test_damaged_weight_is_named(stored: Path) -> None:
    file = stored / "model.safetensors"
    codebook = load_file(file)[UP + ".weight.quant_map"]
    codebook[3] = 0.5
    edit_tensors(file, {UP + ".weight.quant_map": codebook})
    refused(f"model.safetensors: {UP}.weight: quant_map is not", load_checkpoint, stored)
    edit_tensors(file, {UP + ".weight.quant_state.bitsandbytes__nf4": None})
    refused(f"not expected: {UP}.weight.absmax", load_checkpoint, stored)
