"""Merging: the merged weights compute what base + adapter computes, in our hands and others'."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from shared import QLORA, Checkpoints, adapted, checkpoints, logits, quiet_peft, reference

from qlora_builders.checkpoint import (
    load_checkpoint,
    merge_adapter,
    read_arch,
    save_adapter,
    save_checkpoint,
    save_merged,
)
from qlora_builders.errors import CheckpointError
from qlora_builders.models import llama
from qlora_builders.modules import LoRALinear
from qlora_builders.tensor import NF4Tensor

LORA_HEAD = [{"match": "lm_head", "kind": "lora", "rank": 4, "alpha": 8}]
UP, DOWN = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "down"))
CLOSE = {"rtol": 1e-5, "atol": 5e-5}


DORA = [rule | {"use_dora": True} if rule["kind"] != "frozen_nf4" else rule for rule in QLORA]


@pytest.mark.parametrize("plan", [QLORA, DORA])
@pytest.mark.parametrize("variant", ["gqa", "biased", "tied"])
def test_merged_model_computes_base_plus_adapter(variant: str, plan: list) -> None:
    model = adapted(variant, plan)
    before = logits(model)
    merged = merge_adapter(model)
    assert torch.equal(logits(model), before)  # it is left as it is
    assert not any(isinstance(m, LoRALinear) for m in merged.modules())
    assert not any(isinstance(p, NF4Tensor) for p in merged.parameters())
    torch.testing.assert_close(logits(merged), logits(model), **CLOSE)
    unadapted = logits(load_checkpoint(checkpoints(variant), dtype=torch.float32))
    assert (logits(merged) - unadapted).abs().max() > 0.1


@pytest.mark.parametrize("variant", ["gqa", "biased", "tied"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 30_000])
def test_transformers_loads_the_merged_directory(
    tmp_path: Path, variant: str, max_shard_bytes: int
) -> None:
    model = adapted(variant, train=["norm"])
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)  # trained beside the adapters
    out, source = tmp_path / "merged", checkpoints(variant)
    save_merged(model, out, max_shard_bytes=max_shard_bytes, companions=source)
    assert (out / "model.safetensors.index.json").exists() == (max_shard_bytes < 10**9)
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    torch.testing.assert_close(logits(reference(out)), logits(model), **CLOSE)
    torch.testing.assert_close(
        logits(load_checkpoint(out, dtype=torch.float32)), logits(model), **CLOSE
    )


@pytest.mark.parametrize("with_companions", [False, True])
def test_tied_head_with_an_adapter_is_untied(tmp_path: Path, with_companions: bool) -> None:
    """With companions too, though their config.json ties the weights."""
    model = adapted("tied", LORA_HEAD)
    merged = merge_adapter(model)
    assert not merged.spec.arch.tie_word_embeddings
    assert not torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)
    torch.testing.assert_close(logits(merged), logits(model), **CLOSE)
    companions = checkpoints("tied") if with_companions else None
    save_merged(model, tmp_path / "out", companions=companions)
    assert not read_arch(tmp_path / "out").tie_word_embeddings
    torch.testing.assert_close(logits(reference(tmp_path / "out")), logits(model), **CLOSE)


# ---- onto the original weights ------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True])
def test_original_weights_as_base(sharded: bool) -> None:
    source = checkpoints("gqa", sharded=sharded)
    model = adapted()
    originals = {k: v for f in source.glob("*.safetensors") for k, v in load_file(f).items()}
    merged = dict(merge_adapter(model, base=source).named_parameters())
    assert torch.equal(merged[UP], originals[UP])  # NF4 without an adapter
    delta = model.model.layers[0].mlp.down_proj.lora_delta()
    torch.testing.assert_close(merged[DOWN], originals[DOWN] + delta)
    dequantized = dict(merge_adapter(model).named_parameters())
    assert not torch.equal(dequantized[UP], originals[UP])


@quiet_peft
def test_dora_onto_the_originals_is_peft_on_them(tmp_path: Path) -> None:
    """Lengths are those that were trained, directions those of the originals and the update."""
    plan = [rule for rule in DORA if rule["kind"] != "frozen_nf4"]
    model = adapted("gqa", plan)
    save_adapter(model, tmp_path / "adapter")
    report = save_merged(model, tmp_path / "out", base=checkpoints())
    theirs = PeftModel.from_pretrained(reference(checkpoints()), tmp_path / "adapter")
    torch.testing.assert_close(logits(reference(tmp_path / "out")), logits(theirs), **CLOSE)
    assert report.total.relative_delta > 0.1
    assert report.logits.error > 0.01  # the originals are another base


def test_merged_model_does_not_depend_on_the_file(own_copy: Checkpoints) -> None:
    path = own_copy()
    merged = merge_adapter(adapted(), base=path)
    before = {name: p.clone() for name, p in merged.named_parameters()}
    with (path / "model.safetensors").open("r+b") as handle:
        handle.seek(10_000)
        handle.write(bytes(50_000))
    assert all(torch.equal(p, before[name]) for name, p in merged.named_parameters())


def test_trained_parameters_are_not_replaced_by_the_originals() -> None:
    rule = {"match": "layers.0.mlp.up_proj", "kind": "linear", "trainable": True}
    model = adapted("gqa", [*QLORA, rule], train=["norm"])
    with torch.no_grad():
        model.model.norm.weight.add_(1)
        model.model.layers[0].mlp.up_proj.weight.add_(1)
    merged = merge_adapter(model, base=checkpoints())
    assert torch.equal(merged.model.norm.weight, model.model.norm.weight)
    assert torch.equal(merged.get_parameter(UP), model.get_parameter(UP))


def test_tied_head_with_an_adapter_onto_the_originals() -> None:
    """Nothing is quantized here, so the originals are the base exactly."""
    model = adapted("tied", LORA_HEAD)
    merged = merge_adapter(model, base=checkpoints("tied"))
    torch.testing.assert_close(logits(merged), logits(model), **CLOSE)


def test_sum_is_rounded_once() -> None:
    """Of a float32 original, into bfloat16: as exact as bfloat16 can be."""
    source = checkpoints("gqa")
    model = adapted("gqa", QLORA, dtype=torch.bfloat16)
    merged = merge_adapter(model, base=source)
    delta = model.model.layers[0].mlp.down_proj.lora_delta()
    exact = load_file(source / "model.safetensors")[DOWN] + delta
    assert torch.equal(merged.get_parameter(DOWN), exact.bfloat16())


def test_dtype(tmp_path: Path) -> None:
    model = adapted("gqa", QLORA, dtype=torch.bfloat16)
    assert {p.dtype for p in merge_adapter(model).parameters()} == {torch.bfloat16}
    wide = merge_adapter(model, dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    save_merged(model, tmp_path / "out", dtype=torch.float16)
    stored = load_file(tmp_path / "out/model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float16}


# ---- against PEFT -------------------------------------------------------------------------------


@quiet_peft
@pytest.mark.parametrize("base", ["dequantized", "original"])
@pytest.mark.parametrize(
    ("variant", "plan"),
    [
        ("gqa", QLORA),
        ("biased", [QLORA[0] | {"lora_bias": True}]),
        ("tied", QLORA),
    ],
)
def test_peft_merges_to_the_same_weights(
    tmp_path: Path, variant: str, plan: list, base: str
) -> None:
    model = adapted(variant, plan)
    save_adapter(model, tmp_path / "adapter")
    theirs = reference(checkpoints(variant))
    if base == "dequantized":
        frozen = [
            {"match": rule["match"], "kind": "linear" if rule["kind"] == "lora" else "frozen_nf4"}
            for rule in plan
        ]
        quantized = load_checkpoint(checkpoints(variant), frozen, dtype=torch.float32)
        theirs.load_state_dict(quantized.state_dict(), strict=False)
    theirs = PeftModel.from_pretrained(theirs, tmp_path / "adapter").merge_and_unload()
    source = checkpoints(variant) if base == "original" else base
    merged = merge_adapter(model, base=source)
    expected = theirs.state_dict()
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter.data, expected[name], rtol=0, atol=1e-6)
    save_merged(model, tmp_path / "merged", base=source)
    torch.testing.assert_close(
        logits(reference(tmp_path / "merged")), logits(theirs), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("match", ["layers.*.self_attn.q_proj", "layers.1.mlp.down_proj"])
def test_lora_bias_gives_a_llama_biases(tmp_path: Path, match: str) -> None:
    """PEFT cannot merge it into a layer without a bias; Hugging Face's Llama can have one."""
    rule = {"match": match, "kind": "qlora", "rank": 4, "alpha": 8, "lora_bias": True}
    model = adapted("gqa", [rule])
    save_merged(model, tmp_path / "merged")
    arch = read_arch(tmp_path / "merged")
    assert (arch.attention_bias, arch.mlp_bias) == ("attn" in match, "mlp" in match)
    torch.testing.assert_close(logits(reference(tmp_path / "merged")), logits(model), **CLOSE)
    torch.testing.assert_close(logits(merge_adapter(model)), logits(model), **CLOSE)
    stored = load_file(tmp_path / "merged/model.safetensors")
    biases = {name: tensor for name, tensor in stored.items() if name.endswith(".bias")}
    assert {bool(tensor.any()) for tensor in biases.values()} == {True, False}


# ---- errors -------------------------------------------------------------------------------------


def test_nothing_that_merges(tmp_path: Path) -> None:
    model = load_checkpoint(checkpoints(), [{"match": "layers.**", "kind": "frozen_nf4"}])
    with pytest.raises(CheckpointError, match="no LoRA adapter to merge; load one first"):
        merge_adapter(model)
    with pytest.raises(CheckpointError, match="no LoRA adapter to merge"):
        save_merged(model, tmp_path / "out")
    head = adapted("gqa", [LORA_HEAD[0] | {"lora_bias": True}])
    with pytest.raises(CheckpointError, match="lm_head has a lora_bias, but the head of a Llama"):
        merge_adapter(head)
    assert not list(tmp_path.iterdir())


def test_wrong_base(tmp_path: Path) -> None:
    """By its hash; where that is waived, by the first tensor that is missing or does not fit."""
    tied = checkpoints("tied")
    with pytest.raises(CheckpointError, match="not the checkpoint that the model was loaded from"):
        save_merged(adapted(), tmp_path / "out", base=checkpoints(dtype=torch.bfloat16))
    waived = {"allow_base_mismatch": True}
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight has shape \[61, 64\]"):
        merge_adapter(adapted("tied"), base=checkpoints("gqa"), **waived)
    with pytest.raises(CheckpointError, match=r"has shape \[53, 64\]; the model needs \[61, 64\]"):
        save_merged(adapted(), tmp_path / "out", base=tied, **waived)
    deep = replace(read_arch(tied), num_layers=3, tie_word_embeddings=False)
    model = llama(deep, LORA_HEAD)
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.layers\.2.*; is it the base"):
        merge_adapter(model, base=tied)
    strange = tmp_path / "strange"
    shutil.copytree(checkpoints(), strange)
    weights = load_file(strange / "model.safetensors")
    save_file({k: t.flip(0).clone() for k, t in weights.items()}, strange / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"by 1\d\d% of its norm; this is not its original"):
        save_merged(adapted(), tmp_path / "out", base=strange, **waived)
    save_checkpoint(load_checkpoint(checkpoints(), QLORA[2:3]), tmp_path / "nf4", format="nf4")
    with pytest.raises(CheckpointError, match=r"nf4: holds 4-bit weights \(.*; give 16- or 32-bit"):
        save_merged(adapted(), tmp_path / "out", base=tmp_path / "nf4")
    shutil.rmtree(tmp_path / "nf4")
    shutil.rmtree(strange)
    with pytest.raises(CheckpointError, match=r"config\.json: missing; expected a Hugging"):
        save_merged(adapted(), tmp_path / "out", base=tmp_path)
    assert not list(tmp_path.iterdir())
